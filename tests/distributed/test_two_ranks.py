"""torchrun with two ranks gives the losses and metrics of one rank with the doubled batch; nobody is dropped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import main as launcher
from tests.toy import write_toy_dataset

ROOT = Path(__file__).resolve().parents[2]
# 57 users in steps of 16: the last step has 9, an uneven share, and dropout and negatives are on.
USERS = 57

MOL = [
    "train_fn.interaction_module_type = 'MoL'",
    "train_fn.top_k_method = 'MoLBruteForceTopK'",
    "create_mol_interaction_module.dot_product_dimension = 4",
    "create_mol_interaction_module.query_dot_product_groups = 3",
    "create_mol_interaction_module.item_dot_product_groups = 2",
    "create_mol_interaction_module.temperature = 0.5",
    "create_mol_interaction_module.query_dropout_rate = 0.1",
    "create_mol_interaction_module.query_hidden_dim = 8",
    "create_mol_interaction_module.item_dropout_rate = 0.1",
    "create_mol_interaction_module.item_hidden_dim = -1",
    "create_mol_interaction_module.gating_query_hidden_dim = 4",
    "create_mol_interaction_module.gating_qi_hidden_dim = 4",
    "create_mol_interaction_module.gating_item_hidden_dim = 4",
    "create_mol_interaction_module.softmax_dropout_rate = 0.2",
    "create_mol_interaction_module.uid_embedding_hash_sizes = [20, 30]",
]


RETRIEVAL = [
    "train_fn.dataset_name = 'toy'",
    "train_fn.num_negatives = 8",
    "train_fn.num_epochs = 2",
    "train_fn.max_sequence_length = 12",
    "train_fn.item_embedding_dim = 8",
    "train_fn.gradient_clip_norm = 1.0",
]
GENERATIVE = [
    "main.experiment = @train_generative",
    "train_tokenizer.dataset_name = 'toy'",
    "train_tokenizer.embedding_dim = 8",
    "rq_kmeans.sizes = (4, 4)",
    "train_generative.dataset_name = 'toy'",
    "train_generative.num_epochs = 2",
    "train_generative.max_sequence_length = 5",
    "train_generative.gradient_clip_norm = 1.0",
    "train_generative.top_k = 10",
    "beam_search.widths = 10",
]


def train(tmp_path: Path, world_size: int, prefix: str, bindings: list[str]) -> tuple[list[dict], dict]:
    exps = tmp_path / f"exps{world_size}"
    batches = [f"{prefix}.local_batch_size = {16 // world_size}", f"{prefix}.eval_batch_size = {10 + world_size}"]
    flags = [f"--gin_bindings={b}" for b in [*bindings, *batches]]
    flags += [f"--data_dir={tmp_path}", f"--exps_dir={exps}", "--device=cpu"]
    if world_size == 1:
        # In this process, which has imported everything already.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["main.py", *flags])
            launcher.main()
    else:
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        done = subprocess.run([*ranks, "main.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.rstrip().splitlines()[-1].startswith("TEST eval:")
    (folder,) = {p.parent for p in exps.glob("toy-l*/*/metrics.json")}
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize(
    "extra",
    [
        [
            "train_fn.main_module = 'HSTU'",
            "train_fn.sampling_strategy = 'local'",
            "hstu_encoder.dqk = 8",
            "hstu_encoder.dv = 8",
            "hstu_encoder.linear_dropout_rate = 0.2",
            "hstu_encoder.attn_dropout_rate = 0.2",
        ],
        [
            "train_fn.main_module = 'SASRec'",
            "train_fn.sampling_strategy = 'in-batch'",
            "train_fn.logq_correction = True",
            "train_fn.eval_split = 'valid'",
        ],
        [
            "train_fn.main_module = 'SASRec'",
            "train_fn.sampling_strategy = 'local'",
            # Weights at which a loss of a rank's own tokens would show.
            "train_fn.loss_weights = {'mi_loss': 1.0, 'uid_embedding_l2_norm': 1.0}",
            *MOL,
        ],
        [
            "train_fn.main_module = 'SASRec'",
            "train_fn.loss_module = 'FullSoftmaxLoss'",
            "train_fn.sampling_strategy = 'no-explicit-negatives'",
            "train_fn.item_encoder = 'text'",
            "train_fn.loss_candidates = 'trained'",
            "text_item_encoder.embedding_dim = 8",
            "text_item_encoder.num_experts = 3",
        ],
    ],
    ids=["hstu-local", "sasrec-in-batch-valid", "sasrec-mol", "sasrec-text"],
)
def test_two_ranks_equal_one(tmp_path: Path, extra: list[str]) -> None:
    write_toy_dataset(tmp_path, num_users=USERS)
    one, one_final = train(tmp_path, 1, "train_fn", [*RETRIEVAL, *extra])
    two, two_final = train(tmp_path, 2, "train_fn", [*RETRIEVAL, *extra])
    for a, b in zip(one, two, strict=True):
        if "train" in a:
            assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], abs=2e-5)
        assert a["users"] == b["users"] == USERS
        for name, value in a["metrics"].items():
            assert b["metrics"][name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert one_final["counts"] == two_final["counts"]
    assert (one_final["world_size"], two_final["world_size"]) == (1, 2)
    one_loss, two_loss = (final["metrics"].pop("loss") for final in (one_final, two_final))
    assert one_loss == pytest.approx(two_loss, abs=2e-5)
    assert one_final["metrics"] == pytest.approx(two_final["metrics"], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    "extra",
    [
        [
            "train_generative.model = 'TIGER'",
            *(f"tiger.{n}" for n in ("num_encoder_layers = 1", "num_decoder_layers = 1", "dim = 8", "num_heads = 2")),
            *(f"tiger.{n}" for n in ("dkv = 4", "ffn_hidden_dim = 16", "dropout_rate = 0.2", "user_tokens = 5")),
        ],
        [
            "train_generative.model = 'SIDGR'",
            "train_generative.samples = 'last'",
            "train_generative.accumulation_steps = 5",
            *(f"sid_gr.{n}" for n in ("num_blocks = 1", "dim = 8", "num_heads = 2", "dropout_rate = 0.2")),
            "sid_gr.item_embeddings = True",
            "sid_gr.items_at_bos = True",
            *(f"draft_head.{n}" for n in ("width = 8", "items = 'embedded'", "negatives = 'catalogue'")),
            "train_generative.rerank_weight = 0.5",
        ],
        [
            "train_generative.model = 'ParallelTIGER'",
            *(f"parallel_tiger.{n}" for n in ("num_encoder_layers = 1", "num_decoder_layers = 1", "dim = 8")),
            *(f"parallel_tiger.{n}" for n in ("num_heads = 2", "dkv = 4", "ffn_hidden_dim = 16", "dropout_rate = 0.2")),
            *(f"parallel_tiger.{n}" for n in ("training_mode = 'masked'", "loss_normalization = 'per_batch'")),
        ],
        [
            "train_generative.model = 'TIGER'",
            *(f"tiger.{n}" for n in ("num_encoder_layers = 1", "num_decoder_layers = 1", "dim = 8", "num_heads = 2")),
            *(f"tiger.{n}" for n in ("dkv = 4", "ffn_hidden_dim = 16", "dropout_rate = 0.2", "user_tokens = 0")),
            "draft_head.width = 8",
            "draft_head.finetune_epochs = 1",
            "train_generative.search = 'specgr'",
            "specgr.draft_size = 12",
            "specgr.target_acceptance = 0.5",
        ],
    ],
    ids=["tiger", "sid-gr-in-parts-and-items", "parallel-tiger", "tiger-that-drafts"],
)
def test_two_ranks_generate_what_one_does(tmp_path: Path, extra: list[str]) -> None:
    write_toy_dataset(tmp_path, num_users=USERS)
    # Two ranks first: one of them makes the semantic IDs, and the other waits.
    two, two_final = train(tmp_path, 2, "train_generative", [*GENERATIVE, *extra])
    one, one_final = train(tmp_path, 1, "train_generative", [*GENERATIVE, *extra])
    for a, b in zip(one, two, strict=True):
        if a.get("train"):
            assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], abs=2e-5)
        assert a["users"] == b["users"]
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-9, nan_ok=True)
    assert one_final["metrics"] == pytest.approx(two_final["metrics"], abs=1e-9, nan_ok=True)
