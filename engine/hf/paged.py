"""Attention over the paged cache that computes only what each sequence needs.

transformers packs a step into one long row and, without flash attention, masks a dense matrix of
all queries against all cached keys of all sequences: with 32 sequences 31/32 of it is thrown
away, and it is most of a step. Here a step is split by what it asks for:

    decoding    one query per sequence: sequences of similar length together, as one batched
                product over their gathered pages
    runs        a few queries behind what is cached, as tokens of an answer that are known or the
                last of a prompt: together in the same way, as wide as the widest of them
    prefilling  each sequence by itself, causal

The cache tensor and its blocks are transformers'; only the arrangement inside a page is ours,
heads first, so that gathering the pages of a head yields its keys in one piece.

    page: [2 (key, value), num_kv_heads, page_tokens, head_dim]
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache

IMPLEMENTATION = "batchctl_paged"
_MIN_FILL = 0.6
"""A group holds sequences of at least this share of its longest: less padding, more products."""
_MAX_RUN = 16
"""A longer run is a prompt: by itself it is one product of useful size, and pads nobody."""
_MAX_GROUP_TOKENS = 65_536
"""Bounds the copy of keys and values that a group makes in each layer."""


class _Group(msgspec.Struct, frozen=True):
    """Sequences that are computed together, with `width` queries each.

    `rows` are where these stand in the step; a sequence with fewer has its last one repeated.
    """

    size: int
    width: int
    rows: slice | torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


class _Prompt(msgspec.Struct, frozen=True):
    """A sequence that prefills: rows `start` to `stop`; the rest only where a part is cached."""

    start: int
    stop: int
    num_keys: int
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class Plan(msgspec.Struct, frozen=True):
    """Where a step's tokens go in the cache, and what each reads from it, layer by layer."""

    memory: torch.Tensor
    page_tokens: int
    key_places: torch.Tensor
    value_places: torch.Tensor
    groups: list[_Group]
    prompts: list[_Prompt]


class PagedInputs:
    """Prepares steps; takes the place of transformers' own inputs in its batch processor."""

    def __init__(self, cache: PagedAttentionCache, *, device: torch.device) -> None:
        allocator: Any = cache.cache_allocators["full_attention"]
        self._blocks: dict[str, list[int]] = allocator.block_table
        self._device = device
        self._page_tokens = int(allocator.tokens_per_page)
        self._kv_heads = int(allocator.num_key_value_heads)
        self._head_dim = int(allocator.head_dim)
        self._num_layers = len(allocator.layer_indices)
        memory = allocator.cache_tensor
        self._memory: torch.Tensor = memory.view(-1)
        self._block_items = 2 * self._num_layers * self._kv_heads * self._page_tokens
        self._block_items *= self._head_dim
        layers = torch.arange(self._num_layers, device=device).unsqueeze(1)
        self._page_offsets = layers * (2 * self._kv_heads)
        self._token_offsets = self._page_offsets * self._page_tokens
        self.compute_stream = None
        self.requests_in_batch: list[Any] = []
        self.plan: Plan | None = None
        self.tokens = torch.empty(0)
        self.positions = torch.empty(0)
        self.last_places = torch.empty(0)

    def reset(self) -> None:
        """Forget the step."""
        self.requests_in_batch = []
        self.plan = None

    def prepare_batch_update(self) -> tuple[list[Any], list[int], None]:
        """Return the step's requests; transformers asks when it fails them."""
        return self.requests_in_batch, [], None

    def purge(self, key: str) -> None:
        """Take what is not a number out of a sequence's blocks, before others get them.

        Padding is masked, but nothing times NaN is still NaN.
        """
        blocks = self._blocks.get(key)
        if blocks:
            memory = self._memory[: len(self._memory) // self._block_items * self._block_items]
            rows = memory.view(-1, self._block_items)
            at = torch.tensor(blocks, device=self._device)
            rows[at] = rows[at].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def prepare_batch_tensors(self, requests_in_batch: list[Any], **_ignored: object) -> None:
        """Lay out a step: decoding sequences by length, runs by length, then those that prefill."""
        decoding: list[Any] = []
        runs: list[Any] = []
        prefilling: list[Any] = []
        for future in requests_in_batch:
            if future.query_length == 1:
                decoding.append(future)
            elif future.query_length <= _MAX_RUN and future.state.position_offset:
                runs.append(future)
            else:
                prefilling.append(future)
        decoding.sort(key=lambda f: f.state.position_offset)
        runs.sort(key=lambda f: f.state.position_offset + f.query_length)
        self.requests_in_batch = decoding + runs + prefilling
        tokens: list[int] = []
        last: list[int] = []
        spans: list[tuple[int, int]] = []
        for future in self.requests_in_batch:
            state = future.state
            spans.append((state.position_offset, future.query_length))
            tokens.extend(state.tokens_to_process)
            state.position_offset += future.query_length
            if future.has_new_token:
                last.append(len(tokens) - 1)
                state.tokens_to_process = []
        page = self._page_tokens
        single, grouped = len(decoding), len(decoding) + len(runs)
        tables = [self._blocks[f.state.request_id] for f in self.requests_in_batch]
        positions = np.empty(len(tokens), dtype=np.int64)
        blocks = np.empty(len(tokens), dtype=np.int64)
        at = 0
        for (past, length), table in zip(spans, tables, strict=True):
            if length == 1:
                positions[at] = past
                blocks[at] = table[past // page]
            else:
                own = np.arange(past, past + length)
                positions[at : at + length] = own
                blocks[at : at + length] = np.asarray(table, dtype=np.int64)[own // page]
            at += length
        # Of each token, where its first head's key goes in layer 0: rows of head_dim.
        heads = np.arange(self._kv_heads)[:, None]
        pages = blocks * self._num_layers * 2
        places = (pages * self._kv_heads + heads) * page + positions % page
        key_places = self._tensor(places.reshape(1, -1)) + self._token_offsets
        self.tokens = self._tensor(np.asarray(tokens, dtype=np.int64)).unsqueeze(0)
        self.positions = self._tensor(positions).unsqueeze(0)
        self.last_places = self._tensor(np.asarray(last, dtype=np.int64))
        self.plan = Plan(
            memory=self._memory,
            page_tokens=page,
            key_places=key_places,
            value_places=key_places + self._kv_heads * page,
            groups=[
                *self._group(spans[:single], tables, 0),
                *self._group(spans[single:grouped], tables[single:], single),
            ],
            prompts=self._prompts(
                spans[grouped:], tables[grouped:], sum(length for _, length in spans[:grouped])
            ),
        )

    def _group(
        self, spans: list[tuple[int, int]], tables: list[list[int]], first_row: int
    ) -> list[_Group]:
        """Return groups of sequences, of which the first one's queries begin at `first_row`."""
        groups: list[_Group] = []
        page = self._page_tokens
        needed = [-(-(past + length) // page) for past, length in spans]
        pasts = np.array([past for past, _ in spans])
        lengths = np.array([length for _, length in spans])
        rows = first_row + np.cumsum(lengths) - lengths
        stop = len(spans)
        while stop:
            # Lengths rise, so the last is the longest.
            num_pages = needed[stop - 1]
            start = stop - 1
            most = max(1, _MAX_GROUP_TOKENS // (num_pages * page))
            while start and stop - start < most and needed[start - 1] >= num_pages * _MIN_FILL:
                start -= 1
            size, width = stop - start, int(lengths[start:stop].max())
            table = np.zeros((size, num_pages), dtype=np.int64)
            for row, blocks in enumerate(tables[start:stop]):
                count = min(len(blocks), num_pages)
                table[row, :count] = blocks[:count]
            keys, values = self._pages_of(table)
            queries = np.minimum(np.arange(width), lengths[start:stop, None] - 1)
            reach = pasts[start:stop, None] + queries
            bias = np.where(np.arange(num_pages * page) <= reach[:, :, None], 0.0, -np.inf)
            groups.append(
                _Group(
                    size,
                    width,
                    slice(int(rows[start]), int(rows[start]) + size)
                    if width == 1
                    else self._tensor((rows[start:stop, None] + queries).reshape(-1)),
                    keys,
                    values,
                    self._tensor(bias.astype(np.float32)).view(size, 1, 1, width, -1),
                )
            )
            stop = start
        return groups

    def _prompts(
        self, spans: list[tuple[int, int]], tables: list[list[int]], start: int
    ) -> list[_Prompt]:
        prompts: list[_Prompt] = []
        page = self._page_tokens
        for (past, length), table in zip(spans, tables, strict=True):
            stop = start + length
            if past == 0:
                prompts.append(_Prompt(start, stop, length))
            else:
                num_keys = past + length
                needed = np.asarray(table[: -(-num_keys // page)], dtype=np.int64)
                keys, values = self._pages_of(needed.reshape(1, -1))
                mask = np.arange(num_keys) <= np.arange(past, num_keys)[:, None]
                prompts.append(_Prompt(start, stop, num_keys, keys, values, self._tensor(mask)))
            start = stop
        return prompts

    def _pages_of(self, table: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each layer the places of the keys and of the values: rows of a head's page."""
        heads = np.arange(self._kv_heads)[None, :, None]
        places = table[:, None, :] * (self._num_layers * 2 * self._kv_heads) + heads
        keys = self._tensor(places.reshape(1, -1)) + self._page_offsets
        return keys, keys + self._kv_heads

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 -- the plan says who sees what
    *,
    plan: Plan,
    scaling: float | None = None,
    **_ignored: object,
) -> tuple[torch.Tensor, None]:
    """Store a layer's new keys and values, and return what its queries attend to.

    Args:
        query: [1, num_heads, num_tokens, head_dim]; `key` and `value` with num_kv_heads.

    Returns:
        [1, num_tokens, num_heads, head_dim], and no weights.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module has one
    _, num_heads, num_tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    shared = num_heads // kv_heads
    scale = head_dim**-0.5 if scaling is None else scaling
    by_token = plan.memory.view(-1, head_dim)
    by_token.index_copy_(0, plan.key_places[layer], key.reshape(-1, head_dim))
    by_token.index_copy_(0, plan.value_places[layer], value.reshape(-1, head_dim))
    by_page = plan.memory.view(-1, plan.page_tokens * head_dim)
    out = query.new_empty(num_tokens, num_heads, head_dim)
    for group in plan.groups:
        size, width = group.size, group.width
        asked = query[0, :, group.rows].view(kv_heads, shared, size, width, head_dim)
        asked = asked.permute(2, 0, 1, 3, 4).reshape(size * kv_heads, shared * width, head_dim)
        keys = by_page.index_select(0, group.keys[layer]).view(size * kv_heads, -1, head_dim)
        scores = torch.bmm(asked, keys.transpose(1, 2)).float().mul_(scale)
        scores = scores.view(size, kv_heads, shared, width, -1).add_(group.bias)
        weights = scores.softmax(dim=-1).to(query.dtype).view(size * kv_heads, shared * width, -1)
        values = by_page.index_select(0, group.values[layer]).view(size * kv_heads, -1, head_dim)
        attended = torch.bmm(weights, values).view(size, kv_heads, shared, width, head_dim)
        attended = attended.permute(0, 3, 1, 2, 4).reshape(size * width, num_heads, head_dim)
        out[group.rows] = attended
    for prompt in plan.prompts:
        rows = slice(prompt.start, prompt.stop)
        if prompt.keys is None or prompt.values is None:
            keys, values = key[:, :, rows], value[:, :, rows]
        else:
            keys = by_page.index_select(0, prompt.keys[layer]).view(1, kv_heads, -1, head_dim)
            values = by_page.index_select(0, prompt.values[layer]).view(1, kv_heads, -1, head_dim)
            keys, values = keys[:, :, : prompt.num_keys], values[:, :, : prompt.num_keys]
        attended = scaled_dot_product_attention(
            query[:, :, rows],
            keys.repeat_interleave(shared, dim=1) if shared > 1 else keys,
            values.repeat_interleave(shared, dim=1) if shared > 1 else values,
            attn_mask=prompt.mask,
            is_causal=prompt.mask is None,
            scale=scale,
        )
        out[rows] = attended[0].transpose(0, 1)
    return out.unsqueeze(0), None


def suits(model: PreTrainedModel, cache_kinds: Sequence[str]) -> bool:
    """Return whether this attention computes what the model means: plain, causal, full."""
    text: Any = model.config.get_text_config()
    return (
        list(cache_kinds) == ["full_attention"]
        and not getattr(text, "attn_logit_softcapping", None)
        and not getattr(text, "kv_lora_rank", None)
        and not any(hasattr(part, "sinks") for part in model.modules())
    )


def register() -> None:
    """Make the attention known to transformers under `IMPLEMENTATION`."""
    implementation: Callable[..., Any] = attend
    AttentionInterface.register(IMPLEMENTATION, implementation)
