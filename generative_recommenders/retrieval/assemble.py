"""From configuration and prepared data to a model, its splits and its loaders."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from generative_recommenders.config import Config, ConfigError
from generative_recommenders.data.collate import Split, Thinning
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.loader import Loader
from generative_recommenders.encoders.hstu import HSTUConfig
from generative_recommenders.encoders.sasrec import SASRecConfig
from generative_recommenders.losses.bce import BCELoss
from generative_recommenders.losses.full_softmax import FullSoftmaxLoss
from generative_recommenders.losses.negatives import (
    InBatchNegativesSampler,
    LocalNegativesSampler,
    NegativesSampler,
    PopularitySampler,
)
from generative_recommenders.losses.objective import Objective
from generative_recommenders.losses.sampled_softmax import SampledSoftmaxLoss
from generative_recommenders.nn.embeddings import ItemEmbedding
from generative_recommenders.nn.inputs import build_features
from generative_recommenders.nn.outputs import OUTPUTS
from generative_recommenders.nn.text_items import TextItems
from generative_recommenders.retrieval.config import EncoderOptions, LoaderConfig, RetrievalConfig, TextItemsConfig
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.retrieval.text_items import build_text_items
from generative_recommenders.similarity.dot import DotProduct, Similarity
from generative_recommenders.similarity.mol import MoL, MoLConfig, SimilarityOptions

ENCODERS = {"HSTU": "hstu_encoder", "SASRec": "sasrec_encoder"}
_LONGEST_NAME = 200
_MODEL_BINDINGS = (
    "main_module max_sequence_length gr_output_length item_embedding_dim user_embedding_norm item_l2_norm l2_norm_eps "
    "interaction_module_type main_module_bf16 eval_split item_encoder learned_temperature "
    "use_rated_input_preproc input_features_preproc rating_embedding_dim num_ratings event_columns"
).split()


@dataclass(frozen=True)
class Plan:
    """Everything the configuration says about a retrieval experiment, as plain dataclasses."""

    experiment: RetrievalConfig
    encoder: HSTUConfig | SASRecConfig
    encoder_options: EncoderOptions
    loader: LoaderConfig
    similarity: MoLConfig | None = None
    similarity_options: SimilarityOptions = field(default_factory=SimilarityOptions)
    text_items: TextItemsConfig | None = None

    @classmethod
    def of(cls, config: Config) -> Plan:
        experiment = config.experiment()
        encoder = config.build(ENCODERS[experiment.main_module])
        if isinstance(encoder, SASRecConfig) and experiment.item_embedding_dim % encoder.num_heads:
            raise ConfigError(
                f"sasrec_encoder.num_heads: got {encoder.num_heads}, expected a divisor of "
                f"train_fn.item_embedding_dim = {experiment.item_embedding_dim}"
            )
        similarity, options = None, SimilarityOptions()
        if experiment.interaction_module_type == "MoL":
            dim = experiment.item_embedding_dim
            similarity = config.build("create_mol_interaction_module", query_embedding_dim=dim, item_embedding_dim=dim)
            options = config.build("get_similarity_function")
            _check_mol(experiment, similarity)
        return cls(
            experiment,
            encoder,
            config.build("get_sequential_encoder"),
            config.build("create_data_loader"),
            similarity,
            options,
            config.build(TextItemsConfig) if experiment.item_encoder == "text" else None,
        )

    def model_bindings(self) -> dict[str, object]:
        """The bindings that decide what a trained model computes, by their public names."""
        own = {f"train_fn.{name}": getattr(self.experiment, name) for name in _MODEL_BINDINGS}
        own |= {f"{ENCODERS[self.experiment.main_module]}.{k}": v for k, v in asdict(self.encoder).items()}
        if self.similarity is not None:
            own |= {f"create_mol_interaction_module.{k}": v for k, v in asdict(self.similarity).items()}
        return own if self.text_items is None else own | self.text_items.model_bindings()

    def describe(self) -> str:
        """The public name of a run: model, similarity, sampling, loss, batch and optimizer."""
        e = self.experiment
        norm = f"-l2-eps{e.l2_norm_eps}" if e.item_l2_norm else ""
        sampling = e.sampling_strategy + ("-dedup" if e.sampling_strategy == "in-batch" else "") + norm
        temperature = f"-t{e.temperature}" if e.temperature != 1 else ""
        temperature += "-tlearned" if e.learned_temperature else ""
        if e.loss_module == "FullSoftmaxLoss":
            sampling, loss = f"no-explicit-negatives{norm}", f"fsm{temperature}"
        elif e.loss_module == "BCELoss":
            loss = "bce"
        else:
            loss = f"ssl{temperature}-n{e.num_negatives}"
        loss += "-logq" if e.logq_correction else ""
        loss += "-ac" if e.loss_activation_checkpoint else ""
        loss += "".join(f"-lw{name}{weight}" for name, weight in sorted(e.loss_weights.items()))
        loss += "-trained" if e.loss_candidates == "trained" else ""
        similarity = f"MoL-{self.similarity.describe()}" if self.similarity else e.interaction_module_type
        parts = [self.encoder.describe(), similarity, sampling, loss]
        optimizer = f"b{e.local_batch_size}-lr{e.learning_rate}-wu{e.num_warmup_steps}-wd{e.weight_decay}"
        extras = [optimizer, "" if e.enable_tf32 else "notf32", e.eval_split, f"s{e.random_seed}"]
        extras.append(f"fe{e.full_eval_every_n}" if e.full_eval_every_n > 1 else "")
        extras.append("" if e.input_features == "item" else e.input_features)
        extras.append("" if self.text_items is None else self.text_items.describe())
        extras += [f"ev{name}{number}" for name, number in sorted(e.event_columns.items())]
        extras.append(f"d{e.positional_sampling_ratio}" if e.positional_sampling_ratio < 1 else "")
        extras.append("" if e.stochastic_length_alpha is None else f"sl{e.stochastic_length_alpha}")
        name = "-".join(["_".join(parts), *(x for x in extras if x)])
        if len(name) <= _LONGEST_NAME:
            return name
        # File systems take 255 bytes, and a date comes after this.
        return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def build_objective(config: RetrievalConfig, catalog_X: Tensor, counts_X: Tensor) -> Objective:
    """`counts_X` are the training events of each catalogue item."""
    trained_only = config.loss_candidates == "trained"
    candidates = catalog_X[counts_X > 0] if trained_only else catalog_X
    if config.loss_module == "FullSoftmaxLoss":
        return FullSoftmaxLoss(
            catalog_X,
            config.temperature,
            config.item_l2_norm,
            config.l2_norm_eps,
            candidates,
            config.learned_temperature,
        )
    sampler: NegativesSampler
    if config.sampling_strategy == "local":
        sampler = LocalNegativesSampler(candidates)
    elif config.sampling_strategy == "popularity":
        sampler = PopularitySampler(catalog_X, counts_X, trained_only)
    else:
        sampler = InBatchNegativesSampler(catalog_X, counts_X)
    if config.loss_module == "BCELoss":
        return BCELoss(sampler, config.item_l2_norm, config.l2_norm_eps)
    return SampledSoftmaxLoss(
        sampler,
        config.num_negatives,
        config.temperature,
        config.item_l2_norm,
        config.l2_norm_eps,
        config.logq_correction,
        config.learned_temperature,
    )


def checked_top_k_method(config: RetrievalConfig, method: str | None) -> str:
    """`method`, or the config's where it is None. Raises ConfigError for one that cannot search this similarity."""
    if method is None:
        return config.top_k_method
    try:
        return replace(config, top_k_method=method).top_k_method
    except ValueError as error:
        raise ConfigError(str(error).replace("train_fn.top_k_method", "--top_k_method", 1)) from error


def build_similarity(plan: Plan) -> Similarity:
    if plan.similarity is None:
        return DotProduct()
    return MoL(plan.similarity, plan.similarity_options)


def _check_mol(experiment: RetrievalConfig, similarity: MoLConfig) -> None:
    unknown = sorted(experiment.loss_weights.keys() - set(similarity.auxiliary_losses))
    if unknown:
        raise ConfigError(
            f"train_fn.loss_weights: got {unknown[0]!r}, expected auxiliary losses of this model "
            f"({', '.join(similarity.auxiliary_losses)})"
        )


def build_model(
    plan: Plan, catalog_X: Tensor, counts_X: Tensor | None = None, text_XE: Tensor | None = None
) -> RetrievalModel:
    """A model with seeded initial weights; without `counts_X` it has no objective and only serves inference.

    text_XE: vectors of the catalogue's texts, where items are made of them; without, a checkpoint has to bring them.
    """
    config = plan.experiment
    torch.manual_seed(config.random_seed)
    items: ItemEmbedding | TextItems
    if plan.text_items is None:
        items = ItemEmbedding(int(catalog_X[-1]), config.item_embedding_dim)
    else:
        items = build_text_items(plan.text_items, text_XE, catalog_X, counts_X, config.item_embedding_dim)
    features = build_features(
        config.input_features,
        config.num_ratings,
        config.rating_embedding_dim,
        config.item_embedding_dim,
        config.event_columns,
    )
    encoder = plan.encoder.build(
        config.item_embedding_dim,
        config.num_positions,
        config.dropout_rate,
        plan.encoder_options.activation_checkpoint,
        features,
    )
    if counts_X is None:
        objective = Objective(config.temperature, config.learned_temperature)
    else:
        objective = build_objective(config, catalog_X, counts_X)
    return RetrievalModel(
        items,
        encoder,
        OUTPUTS[config.user_embedding_norm](config.l2_norm_eps),
        build_similarity(plan),
        objective,
        catalog_X,
        item_l2_norm=config.item_l2_norm,
        l2_norm_eps=config.l2_norm_eps,
        top_k_method=config.top_k_method,
        encoder_bf16=config.main_module_bf16,
        loss_checkpoint=config.loss_activation_checkpoint,
        loss_weights=config.loss_weights,
    )


@dataclass(frozen=True)
class Splits:
    """Leave-one-out: the events that train, the validation target and the test target.

    With `eval_split = "test"` the validation event trains too, as in the published protocol. A dataset with explicit
    splits has rows for each, and in every one the last event is the target.
    """

    train: Split
    valid: Split
    test: Split

    @classmethod
    def of(cls, config: RetrievalConfig, dataset: PreparedDataset) -> Splits:
        thinning = Thinning(config.positional_sampling_ratio, config.stochastic_length_alpha, config.random_seed)
        held_out = 1 if config.eval_split == "test" else 2
        length = config.max_sequence_length
        if dataset.explicit:
            rows = dataset.split_rows
            return cls(
                train=Split(dataset, length, 0, thinning, rows["train"]),
                valid=Split(dataset, length, 0, of_rows=rows["valid"]),
                test=Split(dataset, length, 0, of_rows=rows["test"]),
            )
        return cls(
            train=Split(dataset, length, held_out, thinning),
            valid=Split(dataset, length, 1),
            test=Split(dataset, length, 0),
        )

    def named(self, name: str) -> Split:
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]


def require_ratings(config: RetrievalConfig, dataset: PreparedDataset) -> None:
    """Raises ConfigError where the model reads ratings and the dataset's do not fit `train_fn.num_ratings`."""
    if config.input_features == "item":
        return
    ratings = dataset.ratings_E
    wrong = ~((ratings >= 0) & (ratings < config.num_ratings))
    if not bool(wrong.any()):
        return
    count = f"{int(wrong.sum()):,} of {ratings.numel():,} events of {dataset.name!r}"
    worst = ratings[wrong][0].item()
    if bool((ratings >= 0).all()) and bool(ratings.isfinite().all()):
        needed = int(ratings.max()) + 1
        raise ConfigError(
            f"train_fn.num_ratings: got {config.num_ratings}, expected at least {needed} for this dataset: "
            f"{count} are beyond, such as {worst:g}"
        )
    raise ConfigError(
        f"train_fn.input_features_preproc: got {config.input_features!r}, expected 'item' for this dataset: the "
        f"ratings of {count} are no number from 0 to {config.num_ratings - 1}, such as {worst:g}"
    )


def require_events(config: RetrievalConfig, dataset: PreparedDataset) -> None:
    """Raises ConfigError where an event column of the dataset does not fit `train_fn.event_columns`."""
    for name, number in config.event_columns.items():
        column = dataset.events[name]
        wrong = (column < 0) | (column >= number)
        if not bool(wrong.any()):
            continue
        count = f"{int(wrong.sum()):,} of {column.numel():,} events of {dataset.name!r}"
        fits = int(column.min()) >= 0
        expected = f"at least {int(column.max()) + 1} for this dataset" if fits else "a column without negative values"
        raise ConfigError(
            f"train_fn.event_columns: got {number} values of {name!r}, expected {expected}: {count} are not "
            f"0 to {number - 1}, such as {int(column[wrong][0])}"
        )


def training_counts(dataset: PreparedDataset, held_out: int) -> Tensor:
    """Events of each catalogue item outside the last `held_out` of every user, int64 (X,).

    With explicit splits only rows of the train split count.
    """
    ends = dataset.offsets[1:] - held_out
    if dataset.explicit:
        first, last = dataset.split_rows["train"]
        rows = torch.arange(dataset.num_users)
        ends = torch.where((rows >= first) & (rows < last), ends, dataset.offsets[:-1])
    trains = torch.arange(dataset.item_ids_E.numel()) < ends.repeat_interleave(dataset.lengths_U)
    places = torch.searchsorted(dataset.catalog.item_ids, dataset.item_ids_E[trains])
    return torch.bincount(places, minlength=len(dataset.catalog))


def evaluation_loader(plan: Plan, split: Split, rank: int, world_size: int) -> Loader:
    """In a fixed shuffled order, so that a partial evaluation sees a sample and not the first users of the file."""
    return _loader(plan, split, plan.experiment.eval_batch_size, rank, world_size)


def training_loader(plan: Plan, split: Split, rank: int, world_size: int) -> Loader:
    loader = _loader(plan, split, plan.experiment.local_batch_size, rank, world_size)
    return replace(loader, drop_last=plan.loader.drop_last)


def _loader(plan: Plan, split: Split, batch_size: int, rank: int, world_size: int) -> Loader:
    return Loader(
        split,
        batch_size,
        seed=plan.experiment.random_seed,
        rank=rank,
        world_size=world_size,
        num_workers=plan.loader.num_workers,
        prefetch_factor=plan.loader.prefetch_factor,
    )
