"""Every shipped config parses, constructs its experiment and uses only bindings that mean something."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from generative_recommenders import config
from generative_recommenders.generative.assemble import Plan
from generative_recommenders.generative.config import GenerativeConfig
from generative_recommenders.retrieval.config import RetrievalConfig
from generative_recommenders.similarity.mol import MoLConfig
from generative_recommenders.tokenizers.config import TokenizerConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.gin"))
LAUNCHED = [path for path in CONFIGS if not path.startswith("configs/base/")]
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
    ("ml-3b/hstu-sampled-softmax-n96-seqlen500-final", 500, 256, 100, 0.2, 128, (4, 4, 64, 64)),
    ("ml-3b/hstu-sampled-softmax-n96-seqlen500-large-final", 500, 256, 100, 0.2, 128, (16, 8, 32, 32)),
    ("ml-3b/sasrec-sampled-softmax-n96-seqlen500-final", 500, 256, 100, 0.2, 128, (4, 4, 256)),
]
# The same of a dataset: batch and evaluation batch, evaluation cadence, workers and prefetch.
CADENCE = {
    "ml-1m": (128, 128, 100, 1, 32, 8, 128),
    "ml-20m": (128, 128, 100, 1, 32, 8, 128),
    "amzn-books": (128, 128, 4000, 5, 64, 8, 1024),
    "ml-3b": (96, 96, 100, 1, 32, 8, 128),
}
BOOKS_SASREC = "amzn-books/sasrec-sampled-softmax-n512-final"

# Published Mixture-of-Logits of a dataset, by the names of create_mol_interaction_module.
MOL_DIMENSIONS = ("query_dot_product_groups", "item_dot_product_groups", "dot_product_dimension")
MOL_SHARED = {
    "temperature": 0.05,
    "dot_product_l2_norm": True,
    "query_hidden_dim": 512,
    "query_dropout_rate": 0.0,
    "item_hidden_dim": -1,
    "item_dropout_rate": 0.1,
    "gating_query_fn": True,
    "gating_item_fn": True,
    "gating_query_hidden_dim": 128,
    "gating_item_hidden_dim": 128,
    "gating_qi_hidden_dim": 128,
    "gating_item_dropout_rate": 0.0,
    "softmax_dropout_rate": 0.2,
    "gating_combination_type": "glu_silu",
    "uid_embedding_level_dropout": False,
    "eps": 1e-6,
}
WITH_USERS = {"mi_loss": 0.001, "uid_embedding_l2_norm": 0.1}
# stem of the names, dimensions, query activation, dropout of the gate's pairs, user tables and their dropout
PUBLISHED_MOL = [
    ("ml-1m/{}-mol-sampled-softmax-n128-8x4x64-rails-final", (8, 4, 64), "swiglu", 0.0, [6040], 0.5),
    ("ml-20m/{}-mol-sampled-softmax-n128-8x4x128-rails-final", (8, 4, 128), "swiglu", 0.1, [16384], 0.8),
    ("amzn-books/{}-mol-sampled-softmax-n512-8x8x32-rails-final", (8, 8, 32), "geglu", 0.0, None, 0.5),
]
# (dataset, encoder): batch, epochs, weight decay, rows scored at a time, epochs between full evaluations, batches of
# the others, epochs between checkpoints, bf16 encoder, bf16 similarity, encoder fields
PUBLISHED_MOL_RUNS = {
    ("ml-1m", "hstu"): (128, 101, 1e-3, None, 1, 32, 1000, False, False, (8, 2, 25, 25)),
    ("ml-1m", "sasrec"): (128, 101, 0.0, None, 1, 32, 1000, False, False, (2, 1, 50)),
    ("ml-20m", "hstu"): (128, 151, 1e-3, None, 1, 32, 1000, False, False, (16, 8, 32, 32)),
    ("ml-20m", "sasrec"): (128, 151, 0.0, None, 1, 32, 1000, False, True, (4, 4, 256)),
    ("amzn-books", "hstu"): (64, 201, 1e-3, 64, 5, 32, 5, True, True, (16, 8, 8, 8)),
    ("amzn-books", "sasrec"): (64, 201, 0.0, 32, 5, 64, 10, False, True, (4, 4, 64)),
}
# Small configs and those of sessions: window, output positions, batch, epochs, width, loss, negatives, temperature,
# ratings embedded, encoder fields.
FULL, SAMPLED = "FullSoftmaxLoss", "SampledSoftmaxLoss"
GPT_HSTU, GPT_SASREC = (4, 2, 1024, 3072), (4, 2, 3072)
SMALL = [
    ("ml-1m/hstu-sampled-softmax-mini-train", 100, 10, 64, 10, 32, SAMPLED, 16, 0.05, False, (1, 1, 32, 32)),
    ("ml-1m/hstu-full-softmax-mini-train", 100, 10, 64, 10, 32, FULL, 1, 1.0, False, (1, 1, 32, 32)),
    ("ml-1m/hstu-sampled-softmax-mini", 100, 10, 64, 0, 32, SAMPLED, 16, 0.05, False, (1, 1, 32, 32)),
    ("ml-1m/sasrec-gpt-like-full-softmax-mini", 20, 10, 64, 10, 1024, FULL, 1, 1.0, False, GPT_SASREC),
    ("merlin/sasrec-gpt-like-full-softmax-mini", 20, 0, 512, 10, 1024, FULL, 1, 1.0, True, GPT_SASREC),
    ("merlin/sasrec-gpt-like-full-softmax-no-ratings-mini", 20, 0, 512, 10, 1024, FULL, 1, 1.0, False, GPT_SASREC),
    ("merlin/sasrec-gpt-like-sampled-softmax-mini", 20, 0, 512, 10, 1024, SAMPLED, 16, 1.0, True, GPT_SASREC),
    ("merlin/hstu-gpt-like-full-softmax-mini", 20, 0, 512, 10, 1024, FULL, 1, 1.0, True, GPT_HSTU),
    ("merlin/hstu-gpt-like-full-softmax-no-ratings-mini", 20, 0, 512, 10, 1024, FULL, 1, 1.0, False, GPT_HSTU),
    ("merlin/hstu-gpt-like-sampled-softmax-mini", 20, 0, 512, 10, 1024, SAMPLED, 16, 1.0, True, GPT_HSTU),
]
# A published config and its twin that is stopped and selected on valid.
TWINS = [
    "hstu-sampled-softmax-n128",
    "hstu-sampled-softmax-n128-large",
    "sasrec-sampled-softmax-n128",
    "hstu-mol-sampled-softmax-n128-8x4x64-rails",
    "sasrec-mol-sampled-softmax-n128-8x4x64-rails",
]


def encoder_fields(loaded: config.Config) -> tuple[int, ...]:
    """num_blocks, num_heads and the widths of the encoder a config builds."""
    module = loaded.experiment().main_module
    built = loaded.build(ENCODERS[module])
    names = ("num_blocks", "num_heads", *(("dqk", "dv") if module == "HSTU" else ("ffn_hidden_dim",)))
    return tuple(getattr(built, name) for name in names)


def mol_of(loaded: config.Config) -> MoLConfig:
    dim = loaded.experiment().item_embedding_dim
    built = loaded.build("create_mol_interaction_module", query_embedding_dim=dim, item_embedding_dim=dim)
    assert isinstance(built, MoLConfig)
    return built


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 36


def build_retrieval(loaded: config.Config, experiment: RetrievalConfig) -> None:
    loaded.build(ENCODERS[experiment.main_module])
    loaded.build("create_data_loader")
    if experiment.item_encoder == "text":
        loaded.build("text_item_encoder")
    if experiment.interaction_module_type == "MoL":
        assert set(experiment.loss_weights) <= set(mol_of(loaded).auxiliary_losses)
        loaded.build("get_similarity_function")


def build_tokenizer(loaded: config.Config, experiment: TokenizerConfig) -> None:
    loaded.build(experiment.tokenizer)


def build_generative(loaded: config.Config, experiment: GenerativeConfig) -> None:
    Plan.of(loaded)
    tokenizer = loaded.build(TokenizerConfig)
    loaded.build(tokenizer.tokenizer)
    # What it makes where it is not there is what it reads.
    assert (tokenizer.dataset_name, (tokenizer.name,)) == (experiment.dataset_name, experiment.semantic_ids)


# What an experiment builds beside its own bindings.
PARTS: dict[type, Callable[[config.Config, Any], None]] = {
    RetrievalConfig: build_retrieval,
    TokenizerConfig: build_tokenizer,
    GenerativeConfig: build_generative,
}


@pytest.mark.parametrize("path", CONFIGS)
def test_config_constructs_its_experiment(path: str) -> None:
    loaded = config.load([path])
    experiment = loaded.experiment()
    PARTS[type(experiment)](loaded, experiment)
    assert loaded.unused_bindings() == []
    again = config.load([], [loaded.operative()])
    assert again.experiment() == experiment


@pytest.mark.parametrize("path", LAUNCHED)
def test_header_gives_command_hardware_and_expectation(path: str) -> None:
    header = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert f"# Command:  python main.py --gin_config_file={path}\n" in text
    assert re.search(r"^# Hardware: \S", text, re.MULTILINE)
    assert re.search(r"^# Expected: \S", text, re.MULTILINE)
    assert re.search(r"^# Verified: \S", text, re.MULTILINE)


@pytest.mark.parametrize("path", LAUNCHED)
def test_dataset_is_that_of_the_folder(path: str) -> None:
    """Or another split of it, which has a name after that."""
    name, folder = config.load([path]).experiment().dataset_name, Path(path).parent.name
    assert name == folder or name.startswith(f"{folder}-")


@pytest.mark.parametrize(("stem", "window", "dim", "epochs", "dropout", "negatives", "encoder"), PUBLISHED)
def test_published_bindings(
    stem: str, window: int, dim: int, epochs: int, dropout: float, negatives: int, encoder: tuple[int, ...]
) -> None:
    loaded = config.load([f"configs/{stem}.gin"])
    train = loaded.experiment()
    assert (train.max_sequence_length, train.item_embedding_dim, train.num_epochs) == (window, dim, epochs)
    assert (train.dropout_rate, train.num_negatives) == (dropout, negatives)
    assert (train.interaction_module_type, train.top_k_method) == ("DotProduct", "MIPSBruteForceTopK")
    assert (train.loss_module, train.sampling_strategy, train.temperature) == ("SampledSoftmaxLoss", "local", 0.05)
    assert (train.item_l2_norm, train.l2_norm_eps, train.user_embedding_norm) == (True, 1e-6, "l2_norm")
    assert (train.learning_rate, train.weight_decay, train.num_warmup_steps) == (1e-3, 0.0, 0)
    assert (train.eval_split, train.early_stopping_patience, train.gr_output_length) == ("test", 0, 10)
    assert encoder_fields(loaded) == encoder
    built = loaded.build(ENCODERS[train.main_module])
    rate = built.linear_dropout_rate if train.main_module == "HSTU" else built.ffn_dropout_rate
    assert rate == dropout


@pytest.mark.parametrize("stem", [row[0] for row in PUBLISHED])
def test_published_batches_and_cadence(stem: str) -> None:
    loaded = config.load([f"configs/{stem}.gin"])
    train, loader = loaded.experiment(), loaded.build("create_data_loader")
    batches = (train.local_batch_size, train.eval_batch_size, train.eval_interval, train.full_eval_every_n)
    rest = (train.partial_eval_num_iters, loader.num_workers, loader.prefetch_factor)
    assert (*batches, *rest) == CADENCE[train.dataset_name]
    assert train.save_ckpt_every_n == (10 if stem == BOOKS_SASREC else 1000)


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
@pytest.mark.parametrize(("stem", "dimensions", "activation", "pairs_dropout", "tables", "user_dropout"), PUBLISHED_MOL)
def test_published_mixture_of_logits(
    encoder: str,
    stem: str,
    dimensions: tuple[int, ...],
    activation: str,
    pairs_dropout: float,
    tables: list[int] | None,
    user_dropout: float,
) -> None:
    loaded = config.load([f"configs/{stem.format(encoder)}.gin"])
    train, mol = loaded.experiment(), mol_of(loaded)
    assert tuple(getattr(mol, name) for name in MOL_DIMENSIONS) == dimensions
    assert "x".join(map(str, dimensions)) in stem
    assert {name: getattr(mol, name) for name in MOL_SHARED} == MOL_SHARED
    assert (mol.query_nonlinearity, mol.gating_qi_dropout_rate) == (activation, pairs_dropout)
    assert (mol.uid_embedding_hash_sizes, mol.uid_dropout_rate) == (tables, user_dropout)
    assert train.loss_weights == (WITH_USERS if tables else {"mi_loss": 0.001})
    assert (train.interaction_module_type, train.top_k_method) == ("MoL", "MoLBruteForceTopK")
    assert (train.temperature, train.item_l2_norm, train.user_embedding_norm) == (1.0, False, "layer_norm")
    similarity = loaded.build("get_similarity_function")
    bf16 = mol.bf16_training or similarity.bf16_training
    counts = (train.eval_user_max_batch_size, train.full_eval_every_n, train.partial_eval_num_iters)
    run = (train.local_batch_size, train.num_epochs, train.weight_decay, *counts, train.save_ckpt_every_n)
    expected = PUBLISHED_MOL_RUNS[train.dataset_name, encoder]
    assert (*run, train.main_module_bf16, bf16, encoder_fields(loaded)) == expected


@pytest.mark.parametrize("row", SMALL, ids=[row[0] for row in SMALL])
def test_small_bindings(row: tuple[object, ...]) -> None:
    loaded = config.load([f"configs/{row[0]}.gin"])
    train = loaded.experiment()
    sizes = (train.max_sequence_length, train.gr_output_length, train.local_batch_size, train.num_epochs)
    loss = (train.item_embedding_dim, train.loss_module, train.num_negatives, train.temperature)
    assert (*sizes, *loss, train.use_rated_input_preproc, encoder_fields(loaded)) == row[1:]
    assert train.dropout_rate == (0.2 if train.item_embedding_dim == 32 else 0.01)


@pytest.mark.parametrize("stem", TWINS)
def test_honest_twins_differ_from_the_published_config_in_the_split_only(stem: str) -> None:
    published = config.load([f"configs/ml-1m/{stem}-final.gin"])
    twin = config.load([f"configs/ml-1m/{stem}-valid.gin"])
    added = ["train_fn.eval_split", "train_fn.early_stopping_patience"]
    assert twin.fingerprint(added) == published.fingerprint()
    assert (twin.experiment().eval_split, twin.experiment().early_stopping_patience) == ("valid", 10)
