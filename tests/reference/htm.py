"""The HTM read as loops, from the formulas of arXiv 2105.14039 and its released code, in plain torch.

    l_m = (x Wq) . (mean(chunk_m) Wk) / sqrt(dim)
    I = the k readable chunks with the largest l;  w = softmax(l over I)
    Y_m = chunk_m + P,  P[place] = sin | cos of (chunk_size - 1 - place) / 10000^(2 f / dim)
    out = sum over m in I of w_m * MHA(query = x, keys = values = Y_m)

Unreadable tokens are taken out of the chunk instead of being masked, unreadable chunks out of the choice.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def positions(chunk_size: int, dim: int) -> Tensor:
    table = torch.zeros(chunk_size, dim, dtype=torch.float64)
    half = (dim + 1) // 2
    for place in range(chunk_size):
        for column in range(dim):
            angle = (chunk_size - 1 - place) / 10000.0 ** (2 * (column % half) / dim)
            table[place, column] = math.sin(angle) if column < half else math.cos(angle)
    return table


def multi_head(x: Tensor, tokens: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    """Attention of one query `[dim]` to `[tokens, dim]`, with its output projection."""
    query, key, value = (weights[f"{name}.weight"] for name in ("query", "key", "value"))
    width = query.shape[0] // heads
    mixed = []
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        keys, values = tokens @ key[rows].T, tokens @ value[rows].T
        attention = torch.softmax(keys @ (query[rows] @ x) / math.sqrt(width), dim=0)
        mixed.append(attention @ values)
    return weights["out.weight"] @ torch.cat(mixed) + weights["out.bias"]


def read(
    weights: Mapping[str, Tensor],
    queries: Tensor,
    memories: Tensor,
    *,
    heads: int,
    topk: int,
    chunk_size: int,
    add_positions: bool = True,
    mask: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    detach: bool = True,
) -> Tensor:
    """`[batch, queries, dim]`; `weights` is the state dict of `htm.HTMAttention`."""
    if detach:
        memories = memories.detach()
    batch, time, dim = memories.shape
    table = positions(chunk_size, dim).to(memories.dtype)
    rows = []
    for row in range(batch):
        for index in range(queries.shape[1]):
            x = queries[row, index]
            summary_query = weights["summary_query.weight"] @ x
            if "summary_query.bias" in weights:
                summary_query = summary_query + weights["summary_query.bias"]
            readable = []
            for number, start in enumerate(range(0, time, chunk_size)):
                places = [
                    place
                    for place in range(min(chunk_size, time - start))
                    if mask is None or mask[row, start + place]
                ]
                if not places or (chunk_mask is not None and not chunk_mask[row, index, number]):
                    continue
                chunk = memories[row, [start + place for place in places]]
                summary = weights["summary_key.weight"] @ (chunk.sum(dim=0) / len(places))
                score = (summary_query @ summary) / math.sqrt(dim)
                readable.append((score, chunk + table[places] if add_positions else chunk))
            readable.sort(key=lambda pair: -pair[0].item())
            best = readable[:topk]
            if not best:
                rows.append(torch.zeros_like(x))
                continue
            share = torch.softmax(torch.stack([score for score, _ in best]), dim=0)
            read_out = [multi_head(x, tokens, weights, heads) for _, tokens in best]
            rows.append(sum(w * out for w, out in zip(share, read_out, strict=True)))
    return torch.stack(rows).view(queries.shape)


def read_matching(
    weights: Mapping[str, Tensor],
    queries: Tensor,
    chunks: list[list[Tensor]],
    *,
    heads: int,
    topk: int,
) -> Tensor:
    """The matching read `[batch, queries, dim]` of `chunks`, for each row a list of `[tokens, 2, dim]`.

    A token stands beside the one before it; keys are made from a mix of both. Queries have a learned length
    and keys are measured in the length that torch's default weights give them; all tokens of the chosen
    chunks share one softmax, to which a chunk's score is added.
    """
    query, key, value = (weights[f"{name}.weight"] for name in ("query", "key", "value"))
    own, before = weights["mix_own"], weights["mix_previous"]
    width, dim = query.shape[0] // heads, queries.shape[-1]
    rows = []
    for row, row_chunks in enumerate(chunks):
        for x in queries[row]:
            asked = weights["summary_query.weight"] @ x
            asked = asked / asked.norm() * weights["summary_log_scale"].exp() / math.sqrt(dim / 3)
            scored = []
            for tokens in row_chunks:
                if len(tokens):
                    mean = tokens.sum(0) / len(tokens)
                    summary = weights["summary_key.weight"] @ (own * mean[0] + before * mean[1])
                    scored.append((asked @ summary, tokens))
            scored.sort(key=lambda pair: -pair[0].item())
            if not scored:
                rows.append(torch.zeros_like(x))
                continue
            mixed = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                q = query[part] @ x
                q = q / q.norm() * weights["log_scale"][head].exp() / math.sqrt(width / 3)
                scores, values = [], []
                for score, tokens in scored[:topk]:
                    for token, last in tokens:
                        scores.append(q @ (key[part] @ (own * token + before * last)) + score)
                        values.append(value[part] @ token)
                mixed.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
            rows.append(weights["out.weight"] @ torch.cat(mixed) + weights["out.bias"])
    return torch.stack(rows).view(queries.shape)
