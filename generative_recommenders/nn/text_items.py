"""Item vectors computed from the items' texts (UniSRec, Hou et al., arXiv 2206.05941, equations 1 to 4).

    e_i = sum_g  a_ig (x_i - b_g) W_g          a_i = softmax(x_i U + z_i softplus(x_i Q) [+ 0.01])

x_i is the fixed text vector of item i, b_g and W_g the parametric whitening of expert g, U the gate and z_i standard
normal noise, in training only. There is no embedding of the id, so an item that no training event has is represented
like any other. Dropout is on x_i where experts read it.

Differences from the public code: all experts of a step see one dropout mask, so that they are one matrix product; masks
and noise are keyed by item id, hence the same on every rank; the vectors of all items are computed once a step instead
of once a use. Initial values are the published ones: W_g normal with standard deviation 0.02, everything else 0.

Letters: V largest item id + 1, E width of texts, D of vectors, G experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.embeddings import ComputedVectors, ItemVectors
from ops.dropout import dropout
from ops.random import uniform_ints

_NOISE_FLOOR = 0.01
# Apart from every stream of an encoder's dropouts.
_DROPOUT_STREAM, _NOISE_STREAM = 1_000_005, 1_000_006
# Uniform numbers have as many steps, the most that float32 holds exactly.
_STEPS = 1 << 24
# Without a gradient, what experts make of this many numbers of items at a time: 64 MB in fp32.
_BLOCK_NUMBERS = 1 << 24


class TextItems(nn.Module):
    """A mixture of whitening experts over frozen text vectors, in the place of an `ItemEmbedding`.

    A checkpoint holds the text vectors. Made of vectors without width, (V, 0), it takes those of the checkpoint that is
    loaded into it, and its own shapes from there.
    """

    text_VE: Tensor

    def __init__(self, text_VE: Tensor, dim: int, *, num_experts: int, dropout_rate: float, noisy_gate: bool) -> None:
        super().__init__()
        self.num_experts, self.dropout_rate = num_experts, dropout_rate
        self.register_buffer("text_VE", text_VE)
        width = text_VE.shape[1]
        # The experts side by side: G blocks of D columns.
        self.experts_EP = nn.Parameter(torch.empty(width, num_experts * dim))
        self.shift_GE = nn.Parameter(torch.zeros(num_experts, width))
        self.gate_EG = nn.Parameter(torch.zeros(width, num_experts))
        self.noise_EG = nn.Parameter(torch.zeros(width, num_experts)) if noisy_gate else None
        self._hollow = width == 0
        self._kept: tuple[object, ComputedVectors] | None = None
        nn.init.normal_(self.experts_EP, std=0.02)

    @property
    def dim(self) -> int:
        return self.experts_EP.shape[1] // self.num_experts

    @property
    def table(self) -> Tensor:
        """(V, D) of the present weights, row = item id, nothing dropped."""
        return self.at(None).table

    def lookup(self, ids: Tensor) -> Tensor:
        """Vectors of int64 ids of any shape, (…, D), nothing dropped."""
        return self.at(None).lookup(ids)

    def at(self, draws: Draws | None) -> ItemVectors:
        """The vectors of all items in a step; draws None means no randomness is wanted.

        Without a gradient they are kept until a weight changes, as far as can be seen, or may have been trained.
        """
        random = draws if self.training else None
        if random is not None or torch.is_grad_enabled():
            self._kept = None
            return ComputedVectors(self._vectors(self.text_VE, random))
        # Writes move a parameter's version, all but those of fused optimizers, for which `train` looks out.
        state = [(p.data_ptr(), p._version) for p in (*self.parameters(), self.text_VE)]
        if self._kept is None or self._kept[0] != state:
            rows = max(1, _BLOCK_NUMBERS // max(1, self.experts_EP.shape[1]))
            # A tensor of inference mode could not be read where gradients are wanted.
            with torch.inference_mode(False), torch.no_grad():
                table = torch.cat([self._vectors(text, None) for text in self.text_VE.split(rows)])
            self._kept = (state, ComputedVectors(table))
        return self._kept[1]

    def train(self, mode: bool = True) -> TextItems:
        self._kept = None
        return super().train(mode)

    def _vectors(self, text_nE: Tensor, draws: Draws | None) -> Tensor:
        """(n, D); with draws the rows are items 0 to n - 1."""
        gates_nG = self._gates(text_nE, draws)
        if draws is not None and self.dropout_rate > 0:
            keys_n = torch.arange(len(text_nE), device=text_nE.device)
            text_nE = dropout(text_nE, self.dropout_rate, draws.stream(_DROPOUT_STREAM), keys_n)
        whole_nGD = (text_nE @ self.experts_EP).unflatten(1, (self.num_experts, -1))
        mixed_nD = torch.bmm(gates_nG[:, None], whole_nGD)[:, 0]
        # What the shifts take away is the same of all items, up to the gate.
        experts_EGD = self.experts_EP.unflatten(1, (self.num_experts, -1))
        shifts_GD = torch.einsum("ge,egd->gd", self.shift_GE, experts_EGD)
        mixed: Tensor = mixed_nD - gates_nG @ shifts_GD
        return mixed

    def _gates(self, text_nE: Tensor, draws: Draws | None) -> Tensor:
        logits_nG = text_nE @ self.gate_EG
        if draws is not None and self.noise_EG is not None:
            scale_nG = F.softplus(text_nE @ self.noise_EG) + _NOISE_FLOOR
            keys_n = torch.arange(len(text_nE), device=text_nE.device)
            logits_nG = logits_nG + scale_nG * _normal(draws.stream(_NOISE_STREAM), keys_n, self.num_experts)
        return logits_nG.softmax(dim=1)

    @property
    def shaped_by_checkpoint(self) -> frozenset[str]:
        """Names of its tensors whose shape a checkpoint decides."""
        return frozenset(self.state_dict()) if self._hollow else frozenset()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}text_VE")
        if self._hollow and found is not None and found.shape[0] == self.text_VE.shape[0]:
            self._widen(found.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _widen(self, width: int) -> None:
        """Room for texts of this width."""
        own = self.text_VE
        self.text_VE = own.new_empty(own.shape[0], width)
        self.experts_EP = nn.Parameter(own.new_empty(width, self.experts_EP.shape[1]))
        self.shift_GE = nn.Parameter(own.new_empty(self.num_experts, width))
        self.gate_EG = nn.Parameter(own.new_empty(width, self.num_experts))
        if self.noise_EG is not None:
            self.noise_EG = nn.Parameter(own.new_empty(width, self.num_experts))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, dim={self.dim}, text={tuple(self.text_VE.shape)}, rate={self.dropout_rate}"


def _normal(seed: int, keys_n: Tensor, count: int) -> Tensor:
    """Standard normal numbers (n, count) by Box and Muller, a function of seed and key."""
    uniform = (uniform_ints(seed, keys_n, 2 * count, _STEPS).float() + 0.5) / _STEPS
    radius, angle = uniform.chunk(2, dim=1)
    return torch.sqrt(-2 * radius.log()) * torch.cos(2 * math.pi * angle)
