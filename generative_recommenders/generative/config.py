"""Bindings of the generative experiment (`main.experiment = @train_generative`), but for the model and the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from generative_recommenders.config import configurable

Candidates = Literal["all", "unseen", "in_sample"]
_POSITIVE = (
    "max_sequence_length local_batch_size accumulation_steps eval_batch_size eval_interval full_eval_every_n "
    "partial_eval_num_iters save_ckpt_every_n top_k rerank_candidates"
).split()
_NOT_NEGATIVE = (
    "num_epochs num_warmup_steps weight_decay gradient_clip_norm early_stopping_patience checkpoint_every_n_steps"
).split()


@configurable("train_generative")
@dataclass(frozen=True)
class GenerativeConfig:
    """Bindings `train_generative.*`; those that `train_fn` has too mean the same here.

    Data: dataset_name, max_sequence_length (history events). semantic_ids: names of the IDs of the items, folders
    `<data_dir>/<dataset_name>/semantic_ids/<name>`; several are modalities of ParallelTIGER. IDs that are not there yet
    are made first if the configuration has `train_tokenizer.name` and what goes with it, as when it includes a
    tokenizer's config. samples: "all_prefixes" trains on every event of a sequence as the target of those before it,
    "random_end" on one of them an epoch, "last" on the last; SIDGR with `sid_gr.loss_on = "all"` learns all events of a
    sequence at once and takes "last".

    Model: model, "TIGER" (bindings `tiger.*`), "ParallelTIGER" (`parallel_tiger.*`) or "SIDGR" (`sid_gr.*`);
    codebook_start: token embeddings start from the tokenizer's codebooks.

    Optimization: num_epochs, learning_rate, num_warmup_steps, schedule ("constant", "cosine", "inverse_sqrt"),
    weight_decay, gradient_clip_norm, local_batch_size (samples a rank and step), accumulation_steps (parts it goes
    through the model in), random_seed.

    Evaluation: eval_split, early_stopping_patience, early_stopping_metric (item level; "sid_…" is SID level),
    eval_batch_size, full_eval_every_n, partial_eval_num_iters, top_k (results a user; the search's widths are
    `beam_search.widths`), filter_history (items of the window are not returned; the published numbers of generative
    models are without), candidates ("all" items are listed, or only those "unseen" in training events, or only those
    that are "in_sample"; chosen anew at every evaluation), search ("beam": the search of the model, bindings
    `beam_search.*`; "specgr": drafts that the model verifies, bindings `specgr.*`), rerank_weight (0 to 1: how much of
    an item's score is that of the draft head and not that of its ID; 0 leaves lists as the search has them),
    rerank_candidates (places of the search's list that the reranked one is made of, top_k at least).
    num_workers: threads that collate ahead.

    Checkpoints: save_ckpt_every_n, checkpoint_every_n_steps, resume.
    """

    dataset_name: str = "amzn14-beauty"
    semantic_ids: tuple[str, ...] = ("rqkmeans",)
    model: Literal["TIGER", "ParallelTIGER", "SIDGR"] = "TIGER"
    max_sequence_length: int = 20
    samples: Literal["all_prefixes", "random_end", "last"] = "all_prefixes"
    codebook_start: bool = False
    num_epochs: int = 100
    learning_rate: float = 1e-3
    num_warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    weight_decay: float = 0.0
    gradient_clip_norm: float = 0.0
    local_batch_size: int = 256
    accumulation_steps: int = 1
    enable_tf32: bool = False
    random_seed: int = 42
    eval_split: Literal["test", "valid"] = "valid"
    early_stopping_patience: int = 0
    early_stopping_metric: str = "ndcg@10"
    eval_interval: int = 1_000_000_000
    eval_batch_size: int = 128
    full_eval_every_n: int = 1
    partial_eval_num_iters: int = 16
    top_k: int = 50
    filter_history: bool = False
    candidates: Candidates = "all"
    search: Literal["beam", "specgr"] = "beam"
    rerank_weight: float = 0.0
    rerank_candidates: int = 100
    num_workers: int = 0
    save_ckpt_every_n: int = 1000
    checkpoint_every_n_steps: int = 0
    resume: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "semantic_ids", tuple(self.semantic_ids))
        for name in _POSITIVE:
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in _NOT_NEGATIVE:
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        self._expect("learning_rate", self.learning_rate > 0, "more than 0")
        self._expect("random_seed", 0 <= self.random_seed < 2**63, "0 to 2^63 - 1")
        self._expect("rerank_weight", 0 <= self.rerank_weight <= 1, "0 to 1")
        self._expect(
            "rerank_weight",
            self.rerank_weight == 0 or self.search == "beam",
            "0 with train_generative.search = 'specgr'; try specgr.drafter_weight",
        )
        self._expect("num_workers", self.num_workers >= 0, "at least 0")
        self._expect("semantic_ids", len(self.semantic_ids) > 0, "the name of one table at least")
        self._expect(
            "semantic_ids",
            len(self.semantic_ids) == 1 or self.model == "ParallelTIGER",
            "one name; several are modalities of train_generative.model = 'ParallelTIGER'",
        )
        self._expect(
            "early_stopping_patience",
            self.early_stopping_patience == 0 or self.eval_split == "valid",
            "0 with train_generative.eval_split = 'test': stopping on test would select on it",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"train_generative.{name}: got {getattr(self, name)!r}, expected {expected}")
