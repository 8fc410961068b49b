"""Every shipped config parses, constructs its experiment and uses only bindings that mean something."""

import re
from pathlib import Path

import pytest

from generative_recommenders import config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.gin"))
ENCODERS = {"HSTU": "hstu_encoder", "SASRec": "sasrec_encoder"}
# Published for `configs/<dataset>/<stem>.gin`: dataset, window, width, epochs, dropout, negatives, encoder fields.
PUBLISHED = [
    ("ml-1m/hstu-sampled-softmax-n128-final", 200, 50, 101, 0.2, 128, (2, 1, 50, 50)),
    ("ml-1m/hstu-sampled-softmax-n128-large-final", 200, 50, 101, 0.2, 128, (8, 2, 25, 25)),
    ("ml-1m/sasrec-sampled-softmax-n128-final", 200, 50, 101, 0.2, 128, (2, 1, 50)),
    ("ml-20m/hstu-sampled-softmax-n128-final", 200, 256, 101, 0.2, 128, (4, 4, 64, 64)),
    ("ml-20m/hstu-sampled-softmax-n128-large-final", 200, 256, 101, 0.2, 128, (16, 8, 32, 32)),
    ("ml-20m/sasrec-sampled-softmax-n128-final", 200, 256, 101, 0.2, 128, (4, 4, 256)),
    ("amzn-books/hstu-sampled-softmax-n512-final", 50, 64, 201, 0.5, 512, (4, 4, 16, 16)),
    ("amzn-books/hstu-sampled-softmax-n512-large-final", 50, 64, 201, 0.5, 512, (16, 8, 8, 8)),
    ("amzn-books/sasrec-sampled-softmax-n512-final", 50, 64, 201, 0.5, 512, (4, 4, 64)),
]


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 18


@pytest.mark.parametrize("path", CONFIGS)
def test_config_constructs_its_experiment(path: str) -> None:
    loaded = config.load([path])
    experiment = loaded.experiment()
    loaded.build(ENCODERS[experiment.main_module])
    loaded.build("create_data_loader")
    assert loaded.unused_bindings() == []
    again = config.load([], [loaded.operative()])
    assert again.experiment() == experiment


@pytest.mark.parametrize("path", [path for path in CONFIGS if not path.startswith("configs/base/")])
def test_header_gives_command_hardware_and_expectation(path: str) -> None:
    header = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert f"# Command:  python main.py --gin_config_file={path}\n" in text
    assert re.search(r"^# Hardware: \S", text, re.MULTILINE)
    assert re.search(r"^# Expected: \S", text, re.MULTILINE)
    assert re.search(r"^# Verified: \S", text, re.MULTILINE)


@pytest.mark.parametrize("path", [path for path in CONFIGS if not path.startswith("configs/base/")])
def test_dataset_is_that_of_the_folder(path: str) -> None:
    assert config.load([path]).experiment().dataset_name == Path(path).parent.name


@pytest.mark.parametrize(("stem", "window", "dim", "epochs", "dropout", "negatives", "encoder"), PUBLISHED)
def test_published_bindings(
    stem: str, window: int, dim: int, epochs: int, dropout: float, negatives: int, encoder: tuple[int, ...]
) -> None:
    loaded = config.load([f"configs/{stem}.gin"])
    train = loaded.experiment()
    assert (train.max_sequence_length, train.item_embedding_dim, train.num_epochs) == (window, dim, epochs)
    assert (train.dropout_rate, train.num_negatives, train.local_batch_size) == (dropout, negatives, 128)
    assert (train.loss_module, train.sampling_strategy, train.temperature) == ("SampledSoftmaxLoss", "local", 0.05)
    assert (train.item_l2_norm, train.l2_norm_eps, train.user_embedding_norm) == (True, 1e-6, "l2_norm")
    assert (train.learning_rate, train.weight_decay, train.num_warmup_steps) == (1e-3, 0.0, 0)
    assert (train.eval_split, train.early_stopping_patience, train.gr_output_length) == ("test", 0, 10)
    built = loaded.build(ENCODERS[train.main_module])
    names = ("num_blocks", "num_heads", *(("dqk", "dv") if train.main_module == "HSTU" else ("ffn_hidden_dim",)))
    assert tuple(getattr(built, name) for name in names) == encoder
    rate = built.linear_dropout_rate if train.main_module == "HSTU" else built.ffn_dropout_rate
    assert rate == dropout


@pytest.mark.parametrize("model", ["hstu", "sasrec"])
def test_honest_twins_differ_from_the_published_config_in_the_split_only(model: str) -> None:
    published = config.load([f"configs/ml-1m/{model}-sampled-softmax-n128-final.gin"])
    twin = config.load([f"configs/ml-1m/{model}-sampled-softmax-n128-valid.gin"])
    added = ["train_fn.eval_split", "train_fn.early_stopping_patience"]
    assert twin.fingerprint(added) == published.fingerprint()
    assert (twin.experiment().eval_split, twin.experiment().early_stopping_patience) == ("valid", 10)
