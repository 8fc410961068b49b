"""Bindings of the retrieval experiment (`main.experiment = @train_fn`): the public names with the public defaults.

Where a public default could not run (interaction module "", no resume) ours does. Names the public code does not have
are marked "ours". Everything is checked here, at construction, before any data is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from generative_recommenders.config import configurable
from generative_recommenders.indexing.approximate import MOL_TOP_K_NAMES, is_mol_top_k, lacks_faiss
from generative_recommenders.nn.inputs import InputFeatures
from generative_recommenders.similarity.dot import SIMILARITIES

_MIPS = "MIPSBruteForceTopK"
_POSITIVE = (
    "max_sequence_length local_batch_size eval_batch_size num_negatives eval_interval full_eval_every_n "
    "save_ckpt_every_n partial_eval_num_iters item_embedding_dim rating_embedding_dim num_ratings"
).split()
_NOT_NEGATIVE = (
    "num_epochs num_warmup_steps weight_decay gr_output_length early_stopping_patience gradient_clip_norm "
    "checkpoint_every_n_steps"
).split()
_OWN_COLUMNS = frozenset({"user_id", "item_ids", "ratings", "timestamps", "request_timestamp"})
_ABOVE_ZERO = ("learning_rate", "temperature", "l2_norm_eps")


@configurable("train_fn")
@dataclass(frozen=True)
class RetrievalConfig:
    """Bindings `train_fn.*`.

    Data: dataset_name, max_sequence_length (history events a user), positional_sampling_ratio (share of training
    events kept), stochastic_length_alpha (ours; see `data.collate`).

    Model: main_module, item_embedding_dim, dropout_rate (of the input), user_embedding_norm, gr_output_length (extra
    positions: the attention normalizer and position tables have max_sequence_length + gr_output_length + 1),
    use_rated_input_preproc (the rating of an event, cut to an integer, or the code of its type is embedded beside its
    item), rating_embedding_dim, num_ratings (ratings are 0 to num_ratings - 1), input_features_preproc (ours: "item",
    "rated", the same as use_rated_input_preproc, or "interleaved", item and rating as two tokens; see `nn.inputs`),
    event_columns (ours: further columns of integers, one an event, that are embedded as ratings are, by name and number
    of values, such as {"action": 5} for 0 to 4),
    main_module_bf16 (bf16 autocast of the encoder), interaction_module_type, embedding_module_type, item_encoder (ours:
    "id" is a table of learned embeddings, "text" computes them from the items' texts, see `text_item_encoder.*`).

    Loss: loss_module, sampling_strategy ("popularity" is ours), num_negatives, temperature, learned_temperature (ours:
    training changes the temperature from there on), item_l2_norm, l2_norm_eps, logq_correction (ours, for in-batch and
    popularity samplers), loss_activation_checkpoint (recompute the loss in backward), loss_weights (auxiliary losses),
    loss_candidates (ours: "trained" leaves items without a training event out of the softmax and of the negatives in
    training, "all" does not).

    Optimization: num_epochs, learning_rate, num_warmup_steps, weight_decay, gradient_clip_norm (ours, 0 is off),
    local_batch_size (users a rank), enable_tf32, random_seed.

    Evaluation: eval_split (ours): "test" trains on all but each user's last event and follows the test curve, the
    published protocol; "valid" holds out the last two, evaluates on the first of them, keeps the best epoch and ends
    with its test metrics. A dataset with explicit splits trains on train and evaluates on valid under either: "test"
    ends with the test metrics of the last epoch, the published protocol. early_stopping_patience (ours): evaluations
    without improvement of early_stopping_metric before stopping, 0 is off, "valid" only. eval_batch_size,
    eval_user_max_batch_size (rows scored at a time), top_k_method, filter_history (ours: candidates seen in the window
    are excluded; a target among them is a miss). eval_interval: steps between metrics on the current training batch.
    full_eval_every_n: epochs between complete evaluations; the others stop after partial_eval_num_iters batches.

    Checkpoints: save_ckpt_every_n (epochs between kept ones), checkpoint_every_n_steps (ours: rolling ones within an
    epoch, 0 is only at its end), resume (ours): "auto" continues the newest unfinished run of this very config,
    "never" starts anew, anything else is a run folder.
    """

    dataset_name: str = "ml-20m"
    max_sequence_length: int = 200
    positional_sampling_ratio: float = 1.0
    stochastic_length_alpha: float | None = None
    local_batch_size: int = 128
    eval_batch_size: int = 128
    eval_user_max_batch_size: int | None = None
    main_module: Literal["SASRec", "HSTU"] = "SASRec"
    main_module_bf16: bool = False
    dropout_rate: float = 0.2
    user_embedding_norm: Literal["l2_norm", "layer_norm"] = "l2_norm"
    sampling_strategy: Literal["in-batch", "local", "popularity", "no-explicit-negatives"] = "in-batch"
    loss_module: Literal["SampledSoftmaxLoss", "FullSoftmaxLoss", "BCELoss"] = "SampledSoftmaxLoss"
    loss_weights: dict[str, float] = field(default_factory=dict)
    loss_candidates: Literal["all", "trained"] = "all"
    num_negatives: int = 1
    loss_activation_checkpoint: bool = False
    logq_correction: bool = False
    item_l2_norm: bool = False
    temperature: float = 0.05
    learned_temperature: bool = False
    num_epochs: int = 101
    learning_rate: float = 1e-3
    num_warmup_steps: int = 0
    weight_decay: float = 1e-3
    gradient_clip_norm: float = 0.0
    top_k_method: str = "MIPSBruteForceTopK"
    filter_history: bool = True
    eval_split: Literal["test", "valid"] = "test"
    early_stopping_patience: int = 0
    early_stopping_metric: str = "ndcg@10"
    eval_interval: int = 100
    full_eval_every_n: int = 1
    save_ckpt_every_n: int = 1000
    checkpoint_every_n_steps: int = 0
    partial_eval_num_iters: int = 32
    embedding_module_type: Literal["local"] = "local"
    item_encoder: Literal["id", "text"] = "id"
    item_embedding_dim: int = 240
    interaction_module_type: str = "DotProduct"
    use_rated_input_preproc: bool = False
    input_features_preproc: InputFeatures = "item"
    rating_embedding_dim: int = 8
    num_ratings: int = 6
    event_columns: dict[str, int] = field(default_factory=dict)
    gr_output_length: int = 10
    l2_norm_eps: float = 1e-6
    enable_tf32: bool = False
    random_seed: int = 42
    resume: str = "auto"

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in _NOT_NEGATIVE:
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        for name in _ABOVE_ZERO:
            self._expect(name, getattr(self, name) > 0, "more than 0")
        self._expect("random_seed", 0 <= self.random_seed < 2**63, "0 to 2^63 - 1")
        self._expect("dropout_rate", 0 <= self.dropout_rate < 1, "0 <= rate < 1")
        self._expect("positional_sampling_ratio", 0 < self.positional_sampling_ratio <= 1, "0 < ratio <= 1")
        alpha = self.stochastic_length_alpha
        self._expect("stochastic_length_alpha", alpha is None or 0 < alpha <= 2, "0 < alpha <= 2, or None")
        micro = self.eval_user_max_batch_size
        self._expect("eval_user_max_batch_size", micro is None or micro >= 1, "at least 1, or None")
        self._check_combinations()
        self._check_event_columns()

    def _check_combinations(self) -> None:
        self._expect(
            "interaction_module_type", self.interaction_module_type in SIMILARITIES, f"one of {_names(SIMILARITIES)}"
        )
        learned = self.interaction_module_type == "MoL"
        self._expect(
            "top_k_method",
            is_mol_top_k(self.top_k_method) if learned else self.top_k_method == _MIPS,
            f"{MOL_TOP_K_NAMES if learned else repr(_MIPS)} "
            f"with train_fn.interaction_module_type = {self.interaction_module_type!r}",
        )
        self._expect(
            "top_k_method", not lacks_faiss(self.top_k_method), "FAISS to be installed: try pip install faiss-cpu"
        )
        self._expect(
            "loss_weights",
            learned or not self.loss_weights,
            "{}: the dot product has no auxiliary losses that could be weighted",
        )
        self._expect(
            "logq_correction",
            not self.logq_correction
            or (self.loss_module == "SampledSoftmaxLoss" and self.sampling_strategy in ("in-batch", "popularity")),
            "False: only SampledSoftmaxLoss with sampling_strategy 'in-batch' or 'popularity' has something to correct",
        )
        if self.loss_module == "BCELoss":
            self._expect("temperature", self.temperature == 1.0, "1.0 with train_fn.loss_module = 'BCELoss'")
            self._expect("learned_temperature", not self.learned_temperature, "False with 'BCELoss', which has none")
        if self.sampling_strategy == "no-explicit-negatives":
            self._expect(
                "sampling_strategy",
                self.loss_module == "FullSoftmaxLoss",
                f"a sampler, since train_fn.loss_module = {self.loss_module!r} draws negatives",
            )
        self._expect(
            "input_features_preproc",
            not self.use_rated_input_preproc or self.input_features_preproc != "interleaved",
            "'rated' or 'item' with train_fn.use_rated_input_preproc = True",
        )
        self._expect(
            "early_stopping_patience",
            self.early_stopping_patience == 0 or self.eval_split == "valid",
            "0 with train_fn.eval_split = 'test': stopping on test would select on it",
        )

    def _check_event_columns(self) -> None:
        columns = self.event_columns
        self._expect("event_columns", all(n >= 1 for n in columns.values()), "at least 1 value of every column")
        # Names are part of the run folder's.
        self._expect("event_columns", all(name.isidentifier() for name in columns), "names of letters, digits and _")
        self._expect(
            "event_columns",
            not columns.keys() & _OWN_COLUMNS,
            f"other columns than {', '.join(sorted(_OWN_COLUMNS))}; "
            "for ratings try train_fn.use_rated_input_preproc = True",
        )
        self._expect(
            "event_columns",
            not columns or self.input_features != "interleaved",
            "{} with train_fn.input_features_preproc = 'interleaved'",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"train_fn.{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def num_positions(self) -> int:
        """n of the equations: window, target and `gr_output_length` further positions, times the tokens of an event."""
        tokens = 2 if self.input_features == "interleaved" else 1
        return tokens * (self.max_sequence_length + self.gr_output_length + 1)

    @property
    def input_features(self) -> InputFeatures:
        """What the encoder reads of an event, by whichever binding says it."""
        return "rated" if self.use_rated_input_preproc else self.input_features_preproc


@configurable("text_item_encoder")
@dataclass(frozen=True)
class TextItemsConfig:
    """Bindings `text_item_encoder.*`.

    Mixture (see `nn.text_items`): num_experts, dropout_rate (of the text vectors), noisy_gate.

    Text vectors: encoder, embeddings_path, embeddings_keys, embedding_dim, template and item_table, as those of
    `train_tokenizer`; whiten: whether they are whitened first.
    """

    num_experts: int = 8
    dropout_rate: float = 0.2
    noisy_gate: bool = True
    encoder: str = "hashed"
    embeddings_path: str | None = None
    embeddings_keys: str | None = None
    embedding_dim: int | None = None
    template: str | None = None
    item_table: str | None = None
    whiten: bool = True

    def __post_init__(self) -> None:
        self._expect("num_experts", self.num_experts >= 1, "at least 1")
        self._expect("dropout_rate", 0 <= self.dropout_rate < 1, "0 <= rate < 1")
        self._expect("embedding_dim", self.embedding_dim is None or self.embedding_dim >= 1, "at least 1, or None")
        named = self.encoder != "file" or self.embeddings_path is not None
        self._expect("embeddings_path", named, "a file with encoder 'file'")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"text_item_encoder.{name}: got {getattr(self, name)!r}, expected {expected}")

    def model_bindings(self) -> dict[str, object]:
        """Those that decide what a trained model computes."""
        mixture = {"num_experts": self.num_experts, "noisy_gate": self.noisy_gate}
        return {f"text_item_encoder.{name}": value for name, value in mixture.items()}

    def describe(self) -> str:
        """For a run's name."""
        whiten = "" if self.whiten else "-raw"
        return f"text-{self.encoder.rstrip('/').rpartition('/')[2]}{whiten}-e{self.num_experts}-d{self.dropout_rate}"


@configurable("create_data_loader")
@dataclass(frozen=True)
class LoaderConfig:
    """num_workers: threads that collate ahead, 0 collates in the loop; prefetch_factor: batches each runs ahead."""

    num_workers: int = 0
    prefetch_factor: int | None = None
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"create_data_loader.num_workers: got {self.num_workers}, expected at least 0")
        if self.prefetch_factor is not None and self.prefetch_factor < 1:
            raise ValueError(
                f"create_data_loader.prefetch_factor: got {self.prefetch_factor}, expected at least 1 or None"
            )


@configurable("get_sequential_encoder")
@dataclass(frozen=True)
class EncoderOptions:
    """activation_checkpoint: recompute each layer in backward instead of keeping its activations."""

    activation_checkpoint: bool = False


def _names(names: object) -> str:
    return ", ".join(repr(name) for name in names)  # type: ignore[attr-defined]
