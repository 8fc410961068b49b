"""Configuration: what is accepted, what is refused and in which words, what is recorded."""

import enum
import logging
import math
import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, Literal

import gin
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from generative_recommenders import config
from generative_recommenders.config import Config, ConfigError, configurable, load
from generative_recommenders.errors import UserError


class Color(enum.Enum):
    RED = "red"
    DARK_BLUE = "dark-blue"


@configurable("toy_head")
@dataclass(frozen=True, slots=True)
class ToyHead:
    width: int = 4
    activation: Literal["relu", "gelu"] = "relu"


@configurable("toy_encoder")
@dataclass(frozen=True)
class ToyEncoder:
    num_items: int = field(metadata={"runtime": True})
    num_blocks: int = 2
    dqk: int = 64


@configurable("toy_train")
@dataclass(frozen=True)
class ToyTrain:
    dataset: str = "ml-1m"
    learning_rate: float = 1e-3
    num_steps: int = 10
    tf32: bool = False
    limit: int | None = None
    module: Literal["HSTU", "SASRec"] = "SASRec"
    color: Color = Color.RED
    loss_weights: dict[str, float] = field(default_factory=dict)
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    names: list[str] = field(default_factory=list)
    head: ToyHead | None = None
    encoder: str = field(default="toy_encoder", metadata={"reference": True})
    number: int | float = 0
    anything: Any = None

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ValueError(f"toy_train.num_steps: got {self.num_steps},\n expected at least 0")


@configurable("toy_required")
@dataclass(frozen=True)
class ToyRequired:
    path: str
    head: ToyHead = ToyHead()


@configurable("toy_loop")
@dataclass(frozen=True)
class ToyLoop:
    inner: Any = None


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; only the toys and what this process has already imported are registered."""
    monkeypatch.setattr(config, "REGISTERING_MODULES", ())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toy(*bindings: str) -> ToyTrain:
    instance = load([], bindings).build("toy_train")
    assert type(instance) is ToyTrain
    return instance


def refusal(*bindings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([], bindings).build("toy_train")
    message = str(caught.value)
    assert "\n" not in message
    return message


def file_refusal(text: str, name: str = "c.gin") -> str:
    Path(name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load([name])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unbound_fields_keep_their_defaults() -> None:
    assert toy() == ToyTrain()


def test_direct_construction_ignores_a_loaded_config() -> None:
    load([], ["toy_train.num_steps = 99"]).build("toy_train")
    assert ToyTrain().num_steps == 10
    with pytest.raises(FrozenInstanceError):
        ToyTrain().num_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("learning_rate = 0.5", 0.5),
        ("learning_rate = 2", 2.0),
        ("learning_rate = -1e-3", -1e-3),
        ("num_steps = 1e9", 1_000_000_000),
        ("tf32 = True", True),
        ("limit = None", None),
        ("limit = 5", 5),
        ("module = 'HSTU'", "HSTU"),
        ("color = 'dark-blue'", Color.DARK_BLUE),
        ("color = 'DARK_BLUE'", Color.DARK_BLUE),
        ("color = %Color.DARK_BLUE", Color.DARK_BLUE),
        ("loss_weights = {'a': 1, 'b': 0.5}", {"a": 1.0, "b": 0.5}),
        ("sizes = [3, 4, 5]", (3, 4, 5)),
        ("sizes = ()", ()),
        ("pair = (2, 'b')", (2, "b")),
        ("names = ('x', 'y')", ["x", "y"]),
        ("number = 1", 1),
        ("number = 1.5", 1.5),
        ("anything = {'x': [1, (2,)]}", {"x": [1, (2,)]}),
        ("head = @toy_head()", ToyHead()),
        ("encoder = @toy_encoder", "toy_encoder"),
        ("encoder = 'toy_encoder'", "toy_encoder"),
    ],
)
def test_accepted_values(binding: str, expected: object) -> None:
    value = getattr(toy(f"toy_train.{binding}"), binding.partition(" ")[0])
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("learning_rate = 'abc'", "toy_train.learning_rate = 'abc': expected float, got str 'abc'"),
        ("learning_rate = True", "expected float, got bool True"),
        ("learning_rate = None", "expected float, got None"),
        ("num_steps = True", "expected int, got bool True"),
        ("num_steps = 1.5", "expected int, got float 1.5"),
        ("num_steps = '3'", "expected int, got str '3'"),
        ("tf32 = 1", "expected bool, got int 1"),
        ("dataset = 3", "expected str, got int 3"),
        ("limit = 'x'", "expected int or None, got str 'x'"),
        ("module = 'HTSU'", "expected one of 'HSTU', 'SASRec', got str 'HTSU'; did you mean HSTU?"),
        ("module = 'LSTM'", "expected one of 'HSTU', 'SASRec', got str 'LSTM'"),
        ("color = 'dark-bleu'", "expected one of 'red', 'dark-blue', got str 'dark-bleu'; did you mean dark-blue?"),
        ("loss_weights = {'a': 'x'}", "expected float, got str 'x'"),
        ("loss_weights = {1: 1.0}", "expected str, got int 1"),
        ("loss_weights = [1.0]", "expected dict[str, float], got list [1.0]"),
        ("sizes = [1, 'a']", "expected int, got str 'a'"),
        ("sizes = 3", "expected tuple[int, ...], got int 3"),
        ("pair = (1,)", "expected tuple[int, str], got tuple (1,)"),
        ("names = 'abc'", "expected list[str], got str 'abc'"),
        ("head = @toy_head", "expected ToyHead or None, got @toy_head; try @toy_head()"),
        ("head = @toy_encoder()", "expected ToyHead or None, got @toy_encoder()"),
    ],
)
def test_wrong_types_are_refused_with_place_and_alternatives(binding: str, expected: str) -> None:
    message = refusal("", f"toy_train.{binding}")
    assert message.startswith(f"--gin_bindings:2: toy_train.{binding.partition(' ')[0]} = ")
    assert message.endswith(expected)


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("toy_trian.num_steps = 3", "toy_trian.num_steps: no configurable is named toy_trian; did you mean toy_train?"),
        ("toy_train.lerning_rate = 3.0", "toy_train has no parameter lerning_rate; did you mean learning_rate?"),
        ("toy_train.dqk = 3", "toy_train has no parameter dqk; did you mean "),
        ("toy_head.zzz = 3", "toy_head has no parameter zzz; known: activation, width"),
        ("toy_encoder.num_items = 3", "toy_encoder.num_items: supplied by the program"),
        ("toy_train.head = @toy_haed()", "@toy_haed: no configurable is named toy_haed; did you mean toy_head?"),
        (
            "toy_train.encoder = @toy_encodr",
            "@toy_encodr: no configurable is named toy_encodr; did you mean toy_encoder?",
        ),
        ("toy_train.encoder = 'toy_encodr'", "no configurable is named toy_encodr; did you mean toy_encoder?"),
        ("main.experiment = @toy_trian", "no configurable is named toy_trian; did you mean toy_train?"),
        (
            "learning_rte = 3\ntoy_train.learning_rate = %learning_rate",
            "%learning_rate: unknown macro; did you mean learning_rte?",
        ),
        ("learning_rate = 3.0", "learning_rate = 3.0: a macro nothing uses; did you mean "),
        ("a = %b\nb = %a\ntoy_train.num_steps = %a", "%a: macro is defined by itself"),
        ("toy_train.num_steps = %gin.REQUIRED", "toy_train.num_steps = %gin.REQUIRED: not set, expected int"),
        ("toy_trian:\n  num_steps = 3", "no configurable is named toy_trian; did you mean toy_train?"),
        ("import no_such_module_here", "import no_such_module_here: No module named 'no_such_module_here'"),
    ],
)
def test_names_that_do_not_exist_get_the_nearest(binding: str, expected: str) -> None:
    lines = binding.count("\n") + 1
    message = refusal(binding)
    assert expected in message
    assert any(message.startswith(f"--gin_bindings:{line}: ") for line in range(1, lines + 1))


def test_public_names_without_implementation_are_refused() -> None:
    message = refusal("get_weighted_loss.weights = {'mi_loss': 1.0}")
    assert "no configurable is named get_weighted_loss" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ntoy_train.module = HSTU\n", "c.gin:2: cannot read 'toy_train.module = HSTU': got HSTU, expected a literal"),
        ("toy_train.sizes = [1,\n", "c.gin:"),
        ("toy_train.num_steps 3\n", "c.gin:1: cannot read 'toy_train.num_steps 3'"),
        ("toy_train.num_steps =\n", "c.gin:1: cannot read"),
        ("toy_train.num_steps = 3 4\n", "c.gin:1: cannot read"),
        ("toy_train.dataset = 'abc\n", "c.gin:1:"),
        ("toy_train.loss_weights = {[1]: 2}\n", "c.gin: unhashable"),
        ("toy_train:\nnum_steps = 3\n", "c.gin:2: cannot read"),
        ("# comment\n\ninclude 'basee.gin'\n", "c.gin:3: include basee.gin: no such file"),
        ("include 'c.gin'\n", "c.gin:1: include c.gin: includes itself"),
        ("include 3\n", "c.gin:1: cannot read 'include 3': Expected file path"),
        ("toy_train.num_steps = 3\ntoy_train.tf32 = 'x'\n", "c.gin:2: toy_train.tf32 = 'x': expected bool"),
    ],
)
def test_files_that_cannot_be_read_are_one_line_with_the_place(text: str, expected: str) -> None:
    assert file_refusal(text).startswith(expected)


def test_missing_file_names_the_nearest() -> None:
    Path("hstu-base.gin").write_text("")
    with pytest.raises(ConfigError, match=r"^hstu-bsae.gin: no such file .*did you mean hstu-base.gin\?$"):
        load(["hstu-bsae.gin"])
    with pytest.raises(ConfigError, match="no such file"):
        load([""])


def test_file_that_is_not_text(folder: Path) -> None:
    (folder / "c.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"^c.gin: cannot be read as UTF-8 text"):
        load(["c.gin"])


def test_paths_fall_back_on_the_repository_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder / "root"
    (root / "configs").mkdir(parents=True)
    (root / "configs/base.gin").write_text("toy_train.num_steps = 5\ntoy_train.tf32 = True\n")
    (root / "configs/a.gin").write_text('include "configs/base.gin"\ntoy_train.num_steps = 6\n')
    here = folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(config, "REPOSITORY_ROOT", root)
    assert load(["configs/a.gin"]).build("toy_train") == ToyTrain(num_steps=6, tf32=True)
    (here / "configs").mkdir()
    (here / "configs/a.gin").write_text("toy_train.num_steps = 7\n")
    assert load(["configs/a.gin"]).build("toy_train") == ToyTrain(num_steps=7)


def test_later_files_and_bindings_win() -> None:
    Path("a.gin").write_text("toy_train.num_steps = 1\ntoy_train.limit = 1\ntoy_train.dataset = %gin.REQUIRED\n")
    Path("b.gin").write_text("toy_train.num_steps = 2\ntoy_train.limit = 2\ntoy_train.dataset = 'x'\n")
    built = load(["a.gin", "b.gin"], ["toy_train.limit = 3"]).build(ToyTrain)
    assert (built.num_steps, built.limit, built.dataset) == (2, 3, "x")


def test_a_macro_can_be_redefined_on_the_command_line() -> None:
    Path("a.gin").write_text("lr = 0.1\nwidth = [1, 2]\ntoy_train.learning_rate = %lr\ntoy_train.sizes = %width\n")
    assert load(["a.gin"]).build("toy_train").learning_rate == 0.1
    changed = load(["a.gin"], ["lr = 1"])
    assert changed.build("toy_train") == ToyTrain(learning_rate=1.0, sizes=(1, 2))
    with pytest.raises(ConfigError, match=r"^a.gin:3: toy_train.learning_rate = 'x': expected float"):
        load(["a.gin"], ["lr = 'x'"])


def test_binding_twice_in_one_file_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Path("a.gin").write_text("toy_train.num_steps = 1\n\ntoy_train.num_steps = 2\n")
    Path("b.gin").write_text("include 'a.gin'\ntoy_train.num_steps = 3\n")
    with caplog.at_level(logging.WARNING):
        assert load(["b.gin"]).build("toy_train").num_steps == 3
    assert [record.getMessage() for record in caplog.records] == [
        "a.gin:3: toy_train.num_steps is bound twice; line 1 has no effect"
    ]


def test_experiment_is_what_main_refers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for written in ("@toy_train", "@toy_train()", "'toy_train'", "%task\ntask = @toy_train"):
        assert load([], [f"main.experiment = {written}", "toy_train.num_steps = 4"]).experiment() == ToyTrain(
            num_steps=4
        )
    with pytest.raises(ConfigError, match=r"^toy_train.num_steps: got -1, expected at least 0$"):
        load([], ["main.experiment = @toy_train", "toy_train.num_steps = -1"]).experiment()
    assert config.Main().experiment == "train_fn"


def test_runtime_values_are_supplied_by_the_caller_and_win() -> None:
    loaded = load([], ["toy_encoder.num_blocks = 3", "toy_encoder.dqk = 8"])
    assert loaded.build("toy_encoder", num_items=7, dqk=9) == ToyEncoder(num_items=7, num_blocks=3, dqk=9)
    assert loaded.unused_bindings() == ["toy_encoder.dqk"]
    assert "num_items" not in loaded.operative()


def test_scopes() -> None:
    loaded = load([], ["toy_head.width = 8", "wide/toy_head.width = 16", "wide/deep/toy_head.activation = 'gelu'"])
    assert loaded.build("toy_head") == ToyHead(8)
    assert loaded.build("wide/toy_head") == ToyHead(16)
    assert loaded.unused_bindings() == ["wide/deep/toy_head.activation"]
    assert loaded.build("wide/deep/toy_head") == ToyHead(16, "gelu")
    assert loaded.unused_bindings() == []
    again = load([], [loaded.operative()])
    assert again.build("wide/deep/toy_head") == ToyHead(16, "gelu")
    assert toy("big/toy_head.width = 32", "toy_train.head = @big/toy_head()").head == ToyHead(32)


def test_missing_required_parameters_name_the_binding() -> None:
    with pytest.raises(ConfigError, match=r"^toy_required.path: not set, expected str"):
        load([], []).build("toy_required")
    with pytest.raises(ConfigError, match=r"^toy_required.path: not set, expected str"):
        load([], ["toy_loop.inner = [@toy_required()]"]).build("toy_loop")
    assert load([], ["toy_required.path = 'p'"]).build("toy_required") == ToyRequired("p")
    assert load([], []).build("toy_required", path="q") == ToyRequired("q")


def test_a_configurable_that_constructs_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^toy_loop: constructs itself through @toy_loop"):
        load([], ["toy_loop.inner = @toy_loop()"]).build("toy_loop")


def test_build_refuses_unknown_names_and_classes() -> None:
    with pytest.raises(ConfigError, match=r"toy_trian: no configurable is named .*did you mean toy_train\?"):
        load([]).build("toy_trian")
    with pytest.raises(ConfigError, match="Path: not a configurable"):
        load([]).build(Path)


def test_values_the_class_refuses_keep_its_words_on_one_line() -> None:
    assert refusal("toy_train.num_steps = -5") == "toy_train.num_steps: got -5, expected at least 0"
    nested = refusal("toy_loop.inner = @toy_train()", "toy_train.num_steps = -5")
    assert nested == "toy_train.num_steps: got -5, expected at least 0"
    assert issubclass(ConfigError, UserError)


def test_nothing_built_is_wrapped_by_gin() -> None:
    loaded = load(
        [], ["toy_train.head = @wide/toy_head()", "wide/toy_head.width = 16", "toy_train.color = 'dark-blue'"]
    )
    built = loaded.build("toy_train")
    assert type(built) is ToyTrain
    assert type(built.head) is ToyHead
    copy = pickle.loads(pickle.dumps(built))
    gin.clear_config()
    assert copy == built == ToyTrain(head=ToyHead(16), color=Color.DARK_BLUE)
    assert type(loaded.build("wide/toy_head")) is ToyHead


def test_unused_bindings_are_those_no_construction_used() -> None:
    loaded = load([], ["toy_train.num_steps = 3", "toy_encoder.num_blocks = 8", "toy_encoder.dqk = 8", "spare = 1"])
    assert loaded.unused_bindings() == ["spare", "toy_encoder.dqk", "toy_encoder.num_blocks", "toy_train.num_steps"]
    loaded.build("toy_train")
    assert loaded.unused_bindings() == ["spare", "toy_encoder.dqk", "toy_encoder.num_blocks"]
    loaded.build("toy_encoder", num_items=1)
    assert loaded.unused_bindings() == ["spare"]


def test_two_configurations_do_not_disturb_each_other() -> None:
    first = load([], ["toy_train.num_steps = 1", "toy_head.width = 1"])
    first.build("toy_train")
    second = load([], ["toy_train.num_steps = 2"])
    assert second.build("toy_train").num_steps == 2
    assert first.build("toy_head").width == 1
    assert first.unused_bindings() == []
    assert "toy_train.num_steps = 1\n" in first.operative()
    assert "toy_train.num_steps = 2\n" in second.operative()
    assert "toy_head" not in second.operative()
    gin.clear_config()
    assert first.build("toy_train").num_steps == 1


def test_operative_and_full_texts_are_read_back() -> None:
    bindings = [
        "import math",
        "main.experiment = @toy_train",
        "toy_train.color = 'dark-blue'",
        "toy_train.loss_weights = {'b': 1, 'a': 2}",
        "toy_train.dataset = 'it\\'s = \"5\"\\n # x'",
        "toy_train.head = @wide/toy_head()",
        "wide/toy_head.width = 9",
        "toy_encoder.dqk = 5",
        f"toy_train.names = {[f'name number {i}' for i in range(40)]}",
    ]
    loaded = load([], bindings)
    built = loaded.experiment()
    Path("operative.gin").write_text(loaded.operative())
    again = load(["operative.gin"])
    assert again.experiment() == built
    assert again.operative() == loaded.operative()
    assert again.unused_bindings() == []
    assert "main.experiment = @toy_train\n" in loaded.operative()
    assert "import math\n" in loaded.operative()
    assert "toy_train.learning_rate = 0.001\n" in loaded.operative()
    assert "toy_encoder." not in loaded.operative()
    assert "toy_encoder.dqk = 5\n" in loaded.full()
    assert "learning_rate" not in loaded.full()
    full = load([], [loaded.full()])
    assert full.experiment() == built
    assert full.fingerprint() == loaded.fingerprint()


def test_fingerprint_is_of_the_resolved_bindings() -> None:
    def fingerprint(*bindings: str, exclude: Sequence[str] = ()) -> str:
        return load([], bindings).fingerprint(exclude)

    base = fingerprint("toy_train.learning_rate = 2", "toy_train.num_steps = 3")
    assert len(base) == 12
    assert fingerprint("steps = 3", "toy_train.num_steps = %steps", "toy_train.learning_rate = 2.0") == base
    assert fingerprint("toy_train.num_steps = 3", "toy_train.learning_rate = 2", "toy_train.tf32 = False") == base
    assert fingerprint("toy_train.num_steps = 4", "toy_train.learning_rate = 2") != base
    assert fingerprint("toy_train.learning_rate = 2", "toy_train.num_steps = 4", exclude=["toy_train.num_steps"]) == (
        fingerprint("toy_train.learning_rate = 2")
    )
    assert fingerprint("toy_head.width = 9", exclude=["toy_head.*"]) == fingerprint()
    assert fingerprint("toy_train.loss_weights = {'a': 1, 'b': 2}") == fingerprint(
        "toy_train.loss_weights = {'b': 2, 'a': 1}"
    )


def test_registering_needs_a_dataclass_and_works_after_a_load() -> None:
    load([]).build("toy_head")
    with pytest.raises(TypeError, match="expected a dataclass"):
        configurable("toy_plain")(int)

    @configurable("toy_late")
    @dataclass(frozen=True)
    class ToyLate:
        size: int = 1

    assert load([], ["toy_late.size = 2"]).build("toy_late") == ToyLate(2)


def test_registering_modules_are_imported_by_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "toy_registering_module.py").write_text(
        "from dataclasses import dataclass\n"
        "from generative_recommenders.config import configurable\n"
        "@configurable('toy_imported')\n"
        "@dataclass(frozen=True)\n"
        "class ToyImported:\n"
        "    size: int = 1\n"
    )
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ConfigError, match="no configurable is named toy_imported"):
        load([], ["toy_imported.size = 2"])
    monkeypatch.setattr(config, "REGISTERING_MODULES", ("toy_registering_module",))
    assert load([], ["toy_imported.size = 2"]).build("toy_imported").size == 2


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=literals, rate=st.floats(allow_nan=False, allow_infinity=False))
def test_any_literal_survives_load_and_operative(value: object, rate: float) -> None:
    loaded = load([], [f"toy_train.anything = {value!r}", f"toy_train.learning_rate = {rate!r}"])
    built = loaded.build("toy_train")
    assert built.anything == value
    assert math.copysign(1, built.learning_rate) == math.copysign(1, rate) and built.learning_rate == rate
    assert load([], [loaded.operative()]).build("toy_train") == built


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="toy_rain.num_steps = 3@%()[]{}'\"\n:/,#-ab", max_size=60))
def test_any_text_loads_or_is_refused_in_one_line(text: str) -> None:
    try:
        loaded: object = load([], [text])
    except ConfigError as error:
        loaded = error
    assert isinstance(loaded, Config) or "\n" not in str(loaded)
