"""A TIGER's weights in a T5 of the transformers package: what others search with, for tests and as a baseline.

`TransformersTiger` generates as the public reimplementations do: `generate` with beams, constrained by
`prefix_allowed_tokens_fn` over a trie of Python dictionaries. One difference: a step's probabilities are over the codes
of its level, so that its lists are those of the model whose weights it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.t5 import Decoder, Encoder
from generative_recommenders.generative.t5_attention import RelativePositionBias
from generative_recommenders.generative.tiger import Tiger
from ops import jagged

PAD, BOS, FIRST_CODE = 0, 1, 2


def load_into(theirs: Any, encoder: Encoder, decoder: Decoder) -> None:
    """Copy the weights of both stacks into a T5 of the same sizes and activation."""
    gated = encoder.shape.activation == "gated-gelu"

    def ffn(block: Any, ours: nn.Module) -> None:
        dense = block.DenseReluDense
        if gated:
            dense.wi_0.weight.copy_(ours.input.weight.chunk(2)[0])
            dense.wi_1.weight.copy_(ours.input.weight.chunk(2)[1])
        else:
            dense.wi.weight.copy_(ours.input.weight)
        dense.wo.weight.copy_(ours.output.weight)

    with torch.no_grad():
        for stack, ours in ((theirs.encoder, encoder), (theirs.decoder, decoder)):
            stack.final_layer_norm.weight.copy_(ours.norm.weight)
            bias = ours.bias if isinstance(ours, Encoder) else ours.self_bias
            assert isinstance(bias, RelativePositionBias)
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(bias.table)
            for block, layer in zip(stack.block, ours.layers, strict=True):
                attention = block.layer[0].SelfAttention
                for name, part in zip("qkv", layer.attention.qkv.weight.chunk(3), strict=True):
                    getattr(attention, name).weight.copy_(part)
                attention.o.weight.copy_(layer.attention.output.weight)
                block.layer[0].layer_norm.weight.copy_(layer.attention_norm.weight)
                if ours is decoder:
                    cross, own = block.layer[1].EncDecAttention, layer.cross
                    cross.q.weight.copy_(own.query.weight)
                    cross.k.weight.copy_(own.key_value.weight.chunk(2)[0])
                    cross.v.weight.copy_(own.key_value.weight.chunk(2)[1])
                    cross.o.weight.copy_(own.output.weight)
                    block.layer[1].layer_norm.weight.copy_(layer.cross_norm.weight)
                block.layer[-1].layer_norm.weight.copy_(layer.ffn_norm.weight)
                ffn(block.layer[-1], layer.ffn)


class TransformersTiger:
    """The T5 of a `Tiger` without user tokens, separators or layers in its heads; needs the transformers package.

    Args:
        tiger: whose weights are copied.
        codes_NL: the IDs of all items.
    """

    def __init__(self, tiger: Tiger, codes_NL: Tensor) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        shape, self.sizes = tiger.encoder.shape, tiger.sizes
        self.table = tiger.table
        self.offsets_L = tiger.tokens.level_offsets_L + FIRST_CODE
        starts = self.offsets_L.tolist()

        class Leveled(T5ForConditionalGeneration):  # type: ignore[misc]
            """Logits of codes of other levels are hidden; the level is how much was decoded before."""

            def forward(self, *args: Any, **named: Any) -> Any:
                # The name of the cache depends on the version of the package.
                cache = named.get("cache", named.get("past_key_values"))
                level = 0 if cache is None else cache.get_seq_length()
                out = super().forward(*args, **named)
                first, hidden = starts[level], torch.full_like(out.logits, -torch.inf)
                legal = slice(first, first + tiger.sizes[level])
                hidden[..., legal] = out.logits[..., legal]
                out.logits = hidden
                return out

        config = T5Config(
            vocab_size=sum(self.sizes) + FIRST_CODE,
            d_model=shape.dim,
            d_kv=shape.dkv,
            d_ff=shape.ffn_hidden_dim,
            num_layers=tiger.config.num_encoder_layers,
            num_decoder_layers=tiger.config.num_decoder_layers,
            num_heads=shape.num_heads,
            relative_attention_num_buckets=tiger.config.relative_attention_num_buckets,
            relative_attention_max_distance=tiger.config.relative_attention_max_distance,
            feed_forward_proj=shape.activation,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            decoder_start_token_id=BOS,
            eos_token_id=None,
        )
        self.model = Leveled(config).eval()
        load_into(self.model, tiger.encoder, tiger.decoder)
        with torch.no_grad():
            assert tiger.tokens.bos is not None
            self.model.shared.weight[BOS] = tiger.tokens.bos
            self.model.shared.weight[FIRST_CODE:] = tiger.tokens.table
            # Versions of the package differ in whether this is the embedding.
            rows = torch.cat([torch.zeros(FIRST_CODE, shape.dim), *tiger.heads.matrices])
            self.model.lm_head.weight = nn.Parameter(rows)
        self.trie: dict[int, Any] = {}
        for codes in (codes_NL + self.offsets_L).tolist():
            node = self.trie
            for code in codes:
                node = node.setdefault(code, {})

    def allowed_tokens(self, _: int, tokens: Tensor) -> list[int]:
        """`prefix_allowed_tokens_fn`: what may follow BOS and the codes so far."""
        node = self.trie
        for token in tokens.tolist()[1:]:
            node = node[token]
        return list(node)

    @torch.no_grad()
    def recommend(self, batch: SequenceBatch, beams: int) -> tuple[Tensor, Tensor]:
        """The `beams` best IDs of each request, int64 (B, beams, L), and their log-probabilities, (B, beams)."""
        codes_TL = self.table.codes_of_items(batch.item_ids_T) + self.offsets_L
        levels = len(self.sizes)
        offsets = batch.offsets * levels
        longest = int(offsets.diff().max())
        ids = jagged.jagged_to_padded(codes_TL.flatten()[:, None].float(), offsets, longest)[..., 0].long()
        mask = torch.arange(longest) < offsets.diff()[:, None]
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=levels,
            do_sample=False,
            length_penalty=0.0,
            prefix_allowed_tokens_fn=self.allowed_tokens,
            output_scores=True,
            return_dict_in_generate=True,
        )
        codes_BKL = found.sequences[:, 1:].view(batch.size, beams, levels) - self.offsets_L
        return codes_BKL, found.sequences_scores.view(batch.size, beams)
