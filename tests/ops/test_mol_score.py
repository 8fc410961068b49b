"""Mixture-of-Logits scores, their mixture and every gradient, ranks and the k best: each place against the formula."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops import mol_score as mol
from ops.mol_score import MoLDropout, blocked, gpu, operator, reference
from ops.mol_score.arguments import COMBINATIONS, DIFFERENTIABLE, Operands
from ops.testing import Place, assert_accurate, offsets_of, outputs_and_gradients, places

REFERENCE, CPU = Place("reference"), Place("cpu")
TEMPERATURE = 0.1
SIDES, HIDDEN, SQUARE = ("q_gate", "x_gate"), ("w1", "b1", "w2", "b2"), ("w2", "b2")
ALL = SIDES + HIDDEN
GATES = [SIDES, SIDES[:1], SIDES[1:], ("w2",), HIDDEN, ("q_gate", "w1", "w2"), ("x_gate", *SQUARE), SIDES + SQUARE, ALL]
IDS, SEEN = torch.arange(5), (torch.tensor([0, 0, 1]), torch.tensor([3]))
Leaves = dict[str, Tensor]


@pytest.fixture(params=places(blocked.refuses))
def place(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=places(blocked.refuses, reference=False))
def fast(request: pytest.FixtureRequest) -> Any:
    return request.param


def drawn(
    batch: int, items: int, n: int = 3, m: int = 2, *, own: bool = False, gate: tuple[str, ...] = ALL, **sizes: Any
) -> Leaves:
    """Components of unit norm and layers as at construction, by the operands' names, of values `dtype` holds."""
    width, hidden, dtype = (sizes.get(k, v) for k, v in (("width", 9), ("hidden", 20), ("dtype", torch.float64)))
    generator = torch.Generator().manual_seed(sizes.get("seed", 0))
    lead, logits = ((batch, items) if own else (items,)), n * m
    middle, scale = hidden if "w1" in gate else logits, (2 / (logits + hidden)) ** 0.5
    layers = [(logits, hidden), (hidden,), (middle, logits), (logits,)]
    shapes = [(batch, n, width), (*lead, m, width), (batch, logits), (*lead, logits), *layers]
    scales = [1.0, 1.0, 1.0, 1.0, scale, 0.1, scale, 0.1]
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = {k: x * scale for k, x, scale in zip(Operands._fields, values, scales, strict=False)}
    leaves |= {name: F.normalize(leaves[name], dim=-1) for name in ("q", "x")}
    return {name: x.to(dtype).double() for name, x in leaves.items() if name in ("q", "x", *gate)}


def singles(place: Place, *shape: int, **options: Any) -> Leaves:
    return {name: place.put(x.float()) for name, x in drawn(*shape, **options).items()}


def operands(leaves: Leaves) -> Operands:
    return Operands(*(leaves.get(name) for name in Operands._fields))


def arguments_of(leaves: Leaves, combination: str = "glu_silu") -> tuple[Any, ...]:
    q, x, q_gate, x_gate, *layers, _ = operands(leaves)
    return mol.MoLQueries(q, q_gate), mol.MoLItems(x, x_gate), mol.MoLGate(*layers, combination)


def joined(scores: Tensor, mean: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture as one tensor, weights in units of equal ones: an entropy alone would be one sample."""
    return scores, torch.cat([mean * len(mean), entropy[None]])


def call(place: Place, combination: str = "glu_silu", mixture: bool = False, layout: Any = None, **given: Any) -> Any:
    leaves = {name: layout(x) if layout else x for name, x in given.items() if name in Operands._fields}
    options = {"temperature": TEMPERATURE, "backend": place.backend} | {
        k: given[k] for k in given.keys() - leaves.keys()
    }
    form = mol.mol_score_with_mixture if mixture else mol.mol_score
    found = form(*arguments_of(leaves, combination), **options)
    return joined(*found) if mixture else found


def plainly(dtype: torch.dtype, combination: str = "glu_silu", dropout: MoLDropout | None = None, **leaves: Any) -> Any:
    """Every step in the dtype, by ordinary PyTorch."""
    prepared = mol._prepared(*arguments_of(leaves, combination), TEMPERATURE, dropout, measure=True)
    scores, sums = reference.mol_score(*prepared, dtype=dtype)
    return joined(scores, sums[:-1] / scores.numel(), sums[-1] / scores.numel())


def check(place: Place, leaves: Leaves, *halves: torch.dtype, of: tuple[str, ...] = (), **options: Any) -> None:
    """Scores, mixture and every gradient against float64, in float32, or in a half precision, all leaves or `of`."""
    dtypes = dict.fromkeys(of or leaves, *halves or (torch.float32,))
    narrow = {name: x.to(dtypes.get(name, torch.float32)) for name, x in leaves.items()}
    found = outputs_and_gradients(partial(call, place, mixture=True, **options), place.put(narrow))
    assert found["out"].dtype == narrow["q"].dtype and found["out1"].dtype == torch.float32
    assert all(found[f"grad_{name}"].dtype == x.dtype for name, x in narrow.items())
    plain = outputs_and_gradients(partial(plainly, torch.float32 if of else dtypes["q"], **options), narrow)
    assert_accurate(found, plain, outputs_and_gradients(partial(plainly, torch.float64, **options), leaves))


@pytest.mark.parametrize("gate", GATES, ids="+".join)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_reference_is_the_formula(combination: str, gate: tuple[str, ...]) -> None:
    for own in (False, True):
        leaves, scores, weights = drawn(3, 4, own=own, gate=gate), [], []
        o = operands(leaves)
        for b, x in itertools.product(range(3), range(4)):
            at = (b, x) if own else x
            logits = torch.stack([query @ item for query in o.q[b] for item in o.x[at]]) / TEMPERATURE
            hidden = logits if o.w1 is None else F.silu(logits @ o.w1 + (0 if o.b1 is None else o.b1))
            g = 0 if o.w2 is None else hidden @ o.w2 + (0 if o.b2 is None else o.b2)
            sides = [t[place] for t, place in ((o.q_gate, b), (o.x_gate, at)) if t is not None]
            g = g + (sum(sides) if combination == "none" or not sides else math.prod(sides))
            normed = (g - g.mean()) / (g.var(correction=0) + 1e-5).sqrt()
            factor = {"none": 1, "glu_silu": torch.sigmoid(g), "glu_silu_ln": torch.sigmoid(normed)}[combination]
            weights.append((g * factor).exp() / (g * factor).exp().sum())
            scores.append(weights[-1] @ logits)
        pi = torch.stack(weights)
        wanted = joined(torch.stack(scores).view(3, 4), pi.mean(dim=0), -(pi * torch.log(pi + 1e-6)).sum(dim=1).mean())
        torch.testing.assert_close(call(REFERENCE, combination, mixture=True, **leaves), wanted)


@pytest.mark.parametrize("gate", GATES, ids="+".join)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gates(fast: Place, combination: str, gate: tuple[str, ...]) -> None:
    check(fast, drawn(8, 32, 8, 4, gate=gate), combination=combination)


# B, X, P_Q, P_X, width, hidden; with their own items few queries, which the interpreter takes one by one.
SHARED = [(1, 60, 1, 1, 3, 5), (9, 33, 8, 4, 64, 40), (7, 30, 1, 9, 17, 11), (8, 32, 2, 3, 140, 8)]
OWN = [(3, 50, 3, 5, 25, 33), (2, 90, 5, 1, 33, 16), (2, 65, 16, 8, 20, 20)]


@pytest.mark.parametrize("shape", SHARED + OWN)
def test_shapes(fast: Place, shape: tuple[int, ...]) -> None:
    *counts, width, hidden = shape
    check(fast, drawn(*counts, width=width, hidden=hidden, own=shape in OWN, seed=1))


@pytest.mark.parametrize(("dtype", "own"), [(torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("of", [(), ("q", "x_gate"), ("q", "x")], ids="+".join)
def test_half_precisions(place: Place, dtype: torch.dtype, of: tuple[str, ...], own: bool) -> None:
    check(place, drawn(3, 33, 3, 3, own=own, width=18, dtype=dtype), dtype, of=of)


@pytest.mark.parametrize(("batch", "items"), [(0, 3), (3, 0)])
def test_nothing_gives_nothing(place: Place, batch: int, items: int) -> None:
    for own in (True, False):
        leaves = singles(place, batch, items, own=own)
        found = outputs_and_gradients(partial(call, place, mixture=True, dropout=MoLDropout(1, 0.1, 0.2)), leaves)
        wanted = {"out": torch.zeros(batch, items), "out1": torch.zeros(7)}
        wanted |= {f"grad_{name}": torch.zeros(x.shape) for name, x in leaves.items()}
        assert all(torch.equal(found[name].cpu(), x) for name, x in wanted.items())
    targets, seen = torch.ones(batch).long(), (torch.zeros(batch + 1).long(), torch.arange(0))
    arguments = (*arguments_of(leaves), place.put(torch.arange(items)))
    options: dict[str, Any] = {"temperature": 1.0, "backend": place.backend}
    assert mol.mol_rank_of_target(*arguments, *place.put((targets, *seen)), **options).tolist() == [0] * batch
    best = mol.mol_topk(*arguments, 2, *place.put(seen), **options)
    assert [x.tolist() for x in best] == [[[float("-inf")] * 2] * batch, [[0, 0]] * batch, [0] * batch]


DROPOUTS = [(MoLDropout(2**63 + 5, 0.3), False), (MoLDropout(-3, 0.0, 0.4), True), (MoLDropout(7, 0.2, 0.3), False)]


@pytest.mark.parametrize(("dropout", "own"), DROPOUTS, ids=["of the gate", "of the mixture", "of both"])
def test_dropout_is_the_same_anywhere_in_any_block(
    fast: Place, dropout: MoLDropout, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks each way, the last ones short, and gradients in parts."""
    monkeypatch.setattr(blocked, "_CPU_PAIRS", 20)
    monkeypatch.setattr(blocked, "_ITEMS", 8)
    for name, value in (("_MIN_BLOCKS", 1), ("_PROGRAMS", 4), ("_WORKERS", 3)):
        monkeypatch.setattr(gpu, name, value)
    check(fast, drawn(3 if own else 9, 40, 4, 3, own=own), dropout=dropout)


def test_dropout_goes_by_seed_and_key(place: Place) -> None:
    leaves, keys_B = singles(place, 6, 5), place.put(torch.arange(6) * 2**33 - 7)

    def scores(rows: slice = slice(0, 6), keys: bool = True, **rates: Any) -> Tensor:
        dropout = MoLDropout(**{"seed": 1, "gate_rate": 0.3} | rates, row_keys=keys_B[rows] if keys else None)
        some = {name: x[rows] if name in ("q", "q_gate") else x for name, x in leaves.items()}
        return call(place, dropout=dropout, **some)

    together = scores()
    torch.testing.assert_close(scores(slice(2, 4)), together[2:4])
    for other in (scores(seed=2), scores(keys=False), scores(mixture_rate=0.3), scores(gate_rate=0.0)):
        assert not torch.isclose(other, together).any(dim=1).all()
    torch.testing.assert_close(scores(gate_rate=0.0), call(place, **leaves))


@pytest.mark.parametrize("filter_history", [True, False])
@pytest.mark.parametrize(("combination", "tied"), [("glu_silu", False), ("glu_silu_ln", True), ("none", False)])
def test_ranks_and_the_k_best_are_those_of_sorted_scores(
    place: Place, combination: str, tied: bool, filter_history: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator.blocked_rank, "block_rows", lambda candidates, device: 4)
    generator = torch.Generator().manual_seed(5)
    leaves = drawn(7, 19, 2, 2)
    if tied:
        # Equal weights and small integers: exact everywhere.
        leaves = {n: torch.randint(-1, 2, leaves[n].shape, generator=generator).double() for n in ("q", "x")}
        leaves["q_gate"] = torch.zeros(7, 4, dtype=torch.float64)
    ids = torch.arange(19) * 3 + 1
    targets, *seen = (ids[torch.randint(0, 19, (b,), generator=generator)] for b in (7, *range(7)))
    targets[3], targets[4] = 2, 99
    seen = [torch.cat([row, torch.tensor([0, 5, 98]), targets[6:].repeat(2 * (b == 6))]) for b, row in enumerate(seen)]
    history = place.put((offsets_of([len(row) for row in seen]), torch.cat(seen)))
    options: dict[str, Any] = {"temperature": 0.25, "filter_history": filter_history, "backend": place.backend}
    arguments = (*arguments_of(place.put({n: x.float() for n, x in leaves.items()}), combination), place.put(ids))
    exact, orders = call(REFERENCE, combination, temperature=0.25, **leaves), []
    for b, row in enumerate(exact.tolist()):
        unseen = [x for x in range(19) if not (filter_history and int(ids[x]) in seen[b])]
        orders.append(torch.tensor(sorted(unseen, key=lambda x, row=row: (-row[x], x))))
    wanted = [[*(ids[order] == t).nonzero()[:, 0] + 1, 0][0] for order, t in zip(orders, targets, strict=True)]
    assert wanted[3] == wanted[4] == 0 and bool(wanted[6]) != filter_history
    assert mol.mol_rank_of_target(*arguments, place.put(targets), *history, **options).tolist() == wanted
    for k in (1, 5, 30):
        scores, best, valid = mol.mol_topk(*arguments, k, *history, **options)
        assert scores.shape == (7, k) and scores.dtype == torch.float32
        for b, order in enumerate(orders):
            left = max(k - len(order), 0)
            assert best[b].tolist() == ids[order[:k]].tolist() + [0] * left and int(valid[b]) == k - left
            expected = F.pad(exact[b, order[:k]], (0, left), value=float("-inf"))
            torch.testing.assert_close(scores[b].cpu().double(), expected, rtol=1e-5, atol=1e-5)


def columns_apart(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize(("layout", "own"), [(columns_apart, True), (transposed, False)])
def test_strided_inputs(place: Place, layout: Any, own: bool) -> None:
    check(place, drawn(3 if own else 8, 32, own=own, seed=1), layout=layout)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_in_a_query_reaches_only_its_scores(place: Place, own: bool) -> None:
    for name in ("q", "q_gate"):
        leaves = singles(place, 3, 5, own=own)
        leaves[name][1, -1] = float("nan")
        assert call(place, **leaves).isnan().tolist() == [[b == 1] * 5 for b in range(3)]


def test_only_the_leaf_that_asks_gets_a_gradient(place: Place) -> None:
    leaves = {name: x.requires_grad_() for name, x in singles(place, 3, 5, gate=SIDES + SQUARE).items()}
    wanted = torch.autograd.grad(call(REFERENCE, **leaves).sum(), [*leaves.values()])
    for name, grad in zip(leaves, wanted, strict=True):
        held = {n: x.detach().clone().requires_grad_(n == name) for n, x in leaves.items()}
        call(place, **held).sum().backward()
        assert [n for n, x in held.items() if x.grad is not None] == [name]
        torch.testing.assert_close(held[name].grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [SIDES, ("x_gate", "w2"), ALL], ids="+".join)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradcheck(combination: str, gate: tuple[str, ...]) -> None:
    leaves = drawn(2, 2, 2, 2, own=gate == ALL, gate=gate, width=2, hidden=2)
    run = partial(call, CPU, combination, mixture=True, temperature=0.5, dropout=MoLDropout(3, 0.3, 0.4))
    inputs = [x.requires_grad_() for x in leaves.values()]
    assert torch.autograd.gradcheck(lambda *x: run(**dict(zip(leaves, x, strict=True))), inputs)


def test_operators_are_registered_soundly(fast: Place) -> None:
    leaves = singles(fast, 2, 3, 2, 2, gate=("x_gate", "w2"))
    leaves |= {"x": transposed(leaves["x"].bfloat16()), "w2": leaves["w2"].half()}
    o, on_triton = operands(leaves), fast.backend == "triton"
    held = [None if t is None else t.detach().requires_grad_() for t in o[:DIFFERENTIABLE]]
    end = ("glu_silu", True, 3, [0.5, 0.0, 0.0], on_triton)
    torch.library.opcheck(torch.ops.gr.mol_score.default, (*held, None, *end))
    upstream = torch.ops.gr.mol_score(*o, *end)
    torch.library.opcheck(torch.ops.gr.mol_score_backward.default, (*upstream, list(o), [True, False] * 4, *end))
    ids, seen = fast.put(torch.arange(3)), fast.put((torch.tensor([0, 1, 2]), torch.tensor([1, 2])))
    arguments, end = (list(o), ids), ("glu_silu", 0.5, on_triton)
    torch.library.opcheck(torch.ops.gr.mol_rank_of_target.default, (*arguments, ids[:2], *seen, *end))
    torch.library.opcheck(torch.ops.gr.mol_topk.default, (*arguments, 2, None, None, *end))


def test_is_compiled_whole(fast: Place) -> None:
    leaves, (ids, seen) = singles(fast, 2, 5), fast.put((IDS, SEEN))
    options: dict[str, Any] = {"temperature": 0.5, "backend": fast.backend}

    def best(**leaves: Tensor) -> tuple[Tensor, ...]:
        ranks = mol.mol_rank_of_target(*arguments_of(leaves), ids, ids[:2], *seen, **options)
        return ranks, *mol.mol_topk(*arguments_of(leaves), ids, 3, *seen, **options)

    def run(**leaves: Tensor) -> Any:
        return call(fast, mixture=True, dropout=MoLDropout(5, 0.1, 0.2), **leaves)

    compiled, best_compiled = (torch.compile(form, fullgraph=True, backend="aot_eager") for form in (run, best))
    found, wanted = (outputs_and_gradients(form, leaves) for form in (compiled, run))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert all(torch.equal(x, y) for x, y in zip(best(**leaves), best_compiled(**leaves), strict=True))


# What is wrong, what is said of it, and by which: score, rank or k best.
WRONG = [
    ({"q": torch.ones(2, 3)}, "mol components: got", "srk"),
    ({"q": torch.ones(2, 3, 9).long()}, "mol components: got", "srk"),
    ({"q_gate": torch.ones(2, 5)}, "mol gate of the queries: got", "s"),
    ({"x_gate": torch.ones(5, 6).long()}, "mol gate of the items: got", "s"),
    ({"w1": torch.ones(5, 4)}, "mol gate w1: got", "s"),
    ({"w1": None}, "mol gate w1: got None beside b1", "s"),
    ({"w2": None}, "mol gate w2: got None beside other weights", "s"),
    (dict.fromkeys(ALL), "mol gate: got no part", "srk"),
    ({"combination": "sum"}, "mol combination: got 'sum', expected one of glu_silu", "srk"),
    ({"temperature": 0.0}, "mol temperature: got 0.0", "rk"),
    ({"temperature": float("nan")}, "mol temperature: got nan", "s"),
    ({"dropout": MoLDropout(1, 0.1, 1.0)}, "mol dropout mixture_rate: got 1.0", "s"),
    ({"dropout": MoLDropout(1, 0.1, row_keys=IDS)}, "mol dropout row_keys: got", "s"),
    ({"x": torch.ones(2, 5, 2, 9), "x_gate": torch.ones(2, 5, 6)}, "mol items: got", "rk"),
    ({"x": torch.full((5, 2, 9), float("nan"))}, "rank scores: got NaN", "rk"),
    ({"ids": IDS[:4]}, "mol items: got", "rk"),
    ({"ids": IDS.flip(0)}, "rank candidate_ids: expected ascending unique", "rk"),
    ({"k": 0}, "topk k: got 0", "k"),
]


@pytest.mark.parametrize(("wrong", "message", "by"), WRONG)
def test_bad_arguments_are_named(wrong: dict[str, Any], message: str, by: str) -> None:
    given = {"ids": IDS, "targets": IDS[:2], "seen": SEEN, "k": 2, "combination": "glu_silu", "temperature": 1.0}
    given |= singles(CPU, 2, 5, hidden=4) | wrong
    arguments = arguments_of(given, given["combination"])
    options = {name: given[name] for name in ("temperature", "dropout") if name in given}
    ranked = {"r": (mol.mol_rank_of_target, "targets"), "k": (mol.mol_topk, "k"), "s": (mol.mol_score, None)}
    for form, last in (ranked[name] for name in by):
        with pytest.raises(ValueError, match=message):
            form(*arguments, *([given["ids"], given[last], *given["seen"]] if last else []), **options)


def layers(leaves: Leaves, x: Tensor, at: str, glu: Any = None) -> Tensor:
    """The public code's layers under a name: linear ones with SiLU between, or one after a gated unit."""
    for name in (f"{at}.{index}" for index in range(4)):
        if f"{name}._w" in leaves:
            left, right = (x @ leaves[f"{name}._w"] + leaves[f"{name}._b"]).chunk(2, dim=-1)
            x = glu(left) * right
        elif f"{name}.weight" in leaves:
            x = x if glu or name[-1] in "01" else F.silu(x)
            x = F.linear(x, leaves[f"{name}.weight"], leaves.get(f"{name}.bias"))
    return x


def projected(config: dict[str, Any], leaves: Leaves, side: str, x: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
    """A side's components and part of the gate, as the public code computes them."""
    glu = F.silu if config.get(f"{side}_nonlinearity") == "swiglu" else F.gelu
    parts = layers(leaves, x, f"_{side}_embeddings_fn._{side}_emb_proj_module", glu)
    parts = parts.unflatten(1, (-1, config["dot_product_dimension"]))
    if side == "query" and "uid_embedding_hash_sizes" in config:
        rows = users % config["uid_embedding_hash_sizes"][0] + 1
        parts = torch.cat([parts, leaves["_query_embeddings_fn._uid_embeddings_0.weight"][rows][:, None]], dim=1)
    if config.get("dot_product_l2_norm", True):
        parts = F.normalize(parts, dim=-1, eps=1e-6)
    return parts, layers(leaves, x, f"_gating_fn._{side}_only_partial_module")


@pytest.mark.parametrize("name", ["mol_ml1m", "mol_books", "mol_item_geglu"])
def test_scores_mixture_and_gradients_of_the_public_code(place: Place, name: str, golden_dir: Path) -> None:
    config = json.loads((golden_dir / "index.json").read_text())[name]
    data = place.put({key: torch.from_numpy(x) for key, x in np.load(golden_dir / f"{name}.npz").items()})
    leaves = {k.removeprefix("param/"): x.requires_grad_() for k, x in data.items() if f"grad/{k[6:]}" in data}
    leaves |= {key: data[key].requires_grad_() for key in ("query", "items")}
    sides = {"query": leaves["query"], "item": leaves["items"][0]}
    q, x = (projected(config, leaves, side, embedded, data["user_ids"]) for side, embedded in sides.items())
    gate = [leaves.get(f"_gating_fn._qi_partial_module.{i}.{k}") for i in (1, 3) for k in ("weight", "bias")]
    gate = [t if t is None or t.dim() == 1 else t.T for t in (gate if gate[2] is not None else [None, None, *gate[:2]])]
    arguments = mol.MoLQueries(*q), mol.MoLItems(*x), mol.MoLGate(*gate)
    options: dict[str, Any] = {"temperature": config["temperature"], "backend": place.backend}
    scores, mean, entropy = mol.mol_score_with_mixture(*arguments, **options)
    torch.testing.assert_close(scores, data["scores"], rtol=1e-5, atol=1e-5)
    mi_loss = entropy + (mean * torch.log(mean + 1e-6)).sum()
    torch.testing.assert_close(mi_loss, data["train_aux/mi_loss"], rtol=1e-5, atol=1e-5)
    (scores * data["probe"]).sum().backward()
    for key, leaf in leaves.items():
        wanted = data[f"grad/{key}"]
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_half_precision_keeps_the_small_gradients_of_a_mean(fast: Place) -> None:
    """A mean over so many pairs that the gradient of one is no number of float16."""
    leaves = drawn(24, 256, 4, 4, width=16, dtype=torch.float16)
    narrow = {name: x.half() for name, x in leaves.items()}

    def loss(**given: Tensor) -> Tensor:
        entropy = mol.mol_score_with_mixture(*arguments_of(given), temperature=TEMPERATURE, backend=fast.backend)[2]
        return entropy * 1e-4

    found = outputs_and_gradients(loss, fast.put(narrow))
    scaled = {name: x.double() for name, x in leaves.items()}
    exact = outputs_and_gradients(partial(_exact_entropy, 1e-4), scaled)
    for name in ("grad_q", "grad_x", "grad_w1", "grad_q_gate"):
        wanted = exact[name]
        # What the gradient's own float16 cannot hold is no fault of the way there.
        apart = (found[name].cpu().double() - wanted).abs().max() / wanted.abs().max()
        step = 2**-25 / wanted.abs().max()
        assert apart < 5e-3 + step, f"{name}: {apart:.1e}"


def _exact_entropy(scale: float, **leaves: Tensor) -> Tensor:
    return plainly(torch.float64, **leaves)[1][-1] * scale


def test_each_gradient_alone_is_that_of_all(fast: Place) -> None:
    leaves = singles(fast, 3, 5)
    everything = outputs_and_gradients(partial(call, fast), leaves)
    for wanted in ("q", "x_gate", "w2"):
        held = {name: x.clone().requires_grad_(name == wanted) for name, x in leaves.items()}
        out = call(fast, **held)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
        (grad,) = torch.autograd.grad(out, held[wanted], upstream)
        torch.testing.assert_close(grad, everything[f"grad_{wanted}"], msg=wanted)


def test_the_longer_side_of_a_grid_goes_first() -> None:
    """CUDA takes 2^31 blocks on the first axis and 65,535 on the second; the interpreter minds neither."""

    def shaped(*x: int, batch: int) -> Operands:
        return Operands(torch.zeros(1, 1, 1).expand(batch, 4, 8), torch.zeros(1).expand(x), *[None] * 7)

    many_items, own_items = shaped(5_000_000, 4, 8, batch=64), shaped(300_000, 200, 4, 8, batch=300_000)
    for o in (many_items, own_items):
        assert gpu._grid(o, gpu._key(o))[1] <= 65_535
    many_queries = shaped(5, 4, 8, batch=3_000_000)
    with_kernels = gpu.refuses() is None
    assert not with_kernels or "blocks along the shorter side" in str(gpu.refuses(many_queries))
