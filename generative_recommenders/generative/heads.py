"""Output heads over codes: a level's logits and its cross-entropy are over that level's own codes and no others.

Shared: one matrix over the codes of all levels, of which a level reads its own rows, so that codes of other levels have
no probability (SID-GR, and TIGER's one vocabulary with the levels it could never emit left out). Not shared: a matrix a
level (the per-level heads of GRID). Tied: the rows of the token embedding, scaled by D^-0.5 as in T5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.generative.tokens import TokenEmbedding

_STD = 0.02


class CodeHeads(nn.Module):
    """Logits of states for each level.

    Args:
        sizes: codes a level, over all modalities.
        dim: D, width of the states.
        shared: one matrix for all levels; otherwise one a level.
        hidden: width of a GELU layer before the matrix, one layer a matrix; 0 is none.
        tied: the embedding whose table is the matrix, which adds no parameters of its own; shared only.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        *,
        shared: bool = True,
        hidden: int = 0,
        tied: TokenEmbedding | None = None,
    ) -> None:
        super().__init__()
        if tied is not None and (not shared or hidden):
            raise ValueError("heads: got a tied table with heads of their own, expected shared heads without a layer")
        self.sizes = tuple(sizes)
        self.shared = shared
        # In a tuple, so that the table stays the embedding's parameter alone, in checkpoints too.
        self._tied = () if tied is None else (tied,)
        groups = [sum(self.sizes)] if shared else list(self.sizes)
        width = hidden or dim
        self.layers = nn.ModuleList(nn.Linear(dim, hidden) for _ in groups) if hidden else None
        self.matrices = nn.ParameterList() if tied else nn.ParameterList(torch.empty(n, width) for n in groups)
        self.starts = [sum(self.sizes[:level]) for level in range(len(self.sizes))]
        for matrix in self.matrices:
            nn.init.normal_(matrix, std=_STD)

    def logits(self, level: int, x: Tensor) -> Tensor:
        """(…, D) -> (…, sizes[level])."""
        group = 0 if self.shared else level
        if self.layers is not None:
            x = F.gelu(self.layers[group](x))
        if self._tied:
            table, x = self._tied[0].table, x * x.shape[-1] ** -0.5
        else:
            table = self.matrices[group]
        start = self.starts[level] if self.shared else 0
        return F.linear(x, table[start : start + self.sizes[level]])

    def losses(self, states_nLD: Tensor, codes_nL: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of each level's code under that level's state, (n, L); 0 where the code is negative."""
        columns = [
            F.cross_entropy(
                self.logits(level, states_nLD[:, level]),
                codes_nL[:, level],
                ignore_index=-1,
                reduction="none",
                label_smoothing=label_smoothing,
            )
            for level in range(len(self.sizes))
        ]
        return torch.stack(columns, -1)

    def log_probs(self, states_LD: Tensor, codes_L: Tensor) -> Tensor:
        """Log-probability of each level's code, (…, L, D) and (…, L) -> (…, L) float32."""
        columns = [
            self.logits(level, states_LD[..., level, :])
            .float()
            .log_softmax(-1)
            .gather(-1, codes_L[..., level, None])[..., 0]
            for level in range(len(self.sizes))
        ]
        return torch.stack(columns, -1)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, shared={self.shared}, tied={bool(self._tied)}"
