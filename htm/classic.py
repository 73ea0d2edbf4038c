"""Code and weights written against the package htm-pytorch.

`HTMAttention` and `HTMBlock` have that package's constructor and call. What differs, on purpose:

- chunks are cut from the oldest memory, so their borders stay as the memory grows; the package pads on the
  old side. For memories that are a multiple of the chunk both are the same;
- padding is never averaged in or attended to, the mean divides by the exact count, and a query that can
  see nothing gets zero;
- the block adds the queries themselves, not the normalised ones;
- `heads` has a default, and more chunks may be asked for than there are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from htm.layers import HTMAttention, HTMBlock

__all__ = ["HTMAttention", "HTMBlock", "load_published"]

_POSITIONS = "pos_emb.inv_freqs"
# adds the same to every score of a query, which softmax and top-k do not see
_WITHOUT_EFFECT = "to_summary_keys.bias"


def load_published(
    module: HTMAttention | HTMBlock, state_dict: Mapping[str, Tensor]
) -> HTMAttention | HTMBlock:
    """Copy weights of htm-pytorch's class of the same name into `module`.

    The outputs then agree to rounding wherever the package is not at fault (see this module). A module
    built without `summary_bias` gets one, because the published weights have it: make the optimiser
    afterwards, and pass `summary_bias=True` where the module is built again.

    Args:
        module: built with the published module's `dim`, `heads`, `dim_head` and `add_pos_enc`; chunk size
            and top-k have no weights and must be given alike.
        state_dict: as saved by htm-pytorch.

    Returns:
        `module` itself.

    Raises:
        ValueError: if a weight is missing, unknown or of another shape; nothing is loaded then.
    """
    given = dict(state_dict)
    block = isinstance(module, HTMBlock)
    attention = module.attn if isinstance(module, HTMBlock) else module
    prefix = "attn." if block else ""
    if block != ("norm.weight" in given):
        kind = "HTMBlock" if "norm.weight" in given else "HTMAttention"
        raise ValueError(
            f"these are the weights of an {kind}, got an {type(module).__name__} to load them into"
        )
    _check_positions(attention, prefix + _POSITIONS in given)

    inner = attention.heads * attention.dim_head
    dim = attention.dim
    shapes = {
        prefix + "to_summary_queries.weight": (dim, dim),
        prefix + "to_summary_queries.bias": (dim,),
        prefix + "to_summary_keys.weight": (dim, dim),
        prefix + "attn.to_q.weight": (inner, dim),
        prefix + "attn.to_kv.weight": (2 * inner, dim),
        prefix + "attn.to_out.weight": (dim, inner),
        prefix + "attn.to_out.bias": (dim,),
    }
    if block:
        shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    ignored = {prefix + _POSITIONS, prefix + _WITHOUT_EFFECT}
    missing, unknown = sorted(shapes.keys() - given.keys()), sorted(given.keys() - shapes.keys() - ignored)
    if missing or unknown:
        raise ValueError(
            f"not a state dict of htm-pytorch's {type(module).__name__}: missing {missing}, unknown {unknown}"
        )
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise ValueError(
                f"{name} has shape {list(given[name].shape)}, this module needs {list(shape)}: build it with "
                "the published module's dim, heads and dim_head"
            )

    if attention.summary_query.bias is None:
        attention.summary_query.bias = nn.Parameter(torch.empty_like(attention.out.bias))
    keys, values = given[prefix + "attn.to_kv.weight"].chunk(2, dim=0)
    pairs: list[tuple[Tensor, Tensor]] = [
        (attention.summary_query.weight, given[prefix + "to_summary_queries.weight"]),
        (attention.summary_query.bias, given[prefix + "to_summary_queries.bias"]),
        (attention.summary_key.weight, given[prefix + "to_summary_keys.weight"]),
        (attention.query.weight, given[prefix + "attn.to_q.weight"]),
        (attention.key.weight, keys),
        (attention.value.weight, values),
        (attention.out.weight, given[prefix + "attn.to_out.weight"]),
        (attention.out.bias, given[prefix + "attn.to_out.bias"]),
    ]
    if isinstance(module, HTMBlock):
        pairs += [(module.norm.weight, given["norm.weight"]), (module.norm.bias, given["norm.bias"])]
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
    return module


def _check_positions(attention: HTMAttention, published: bool) -> None:
    if published == attention.add_pos_enc:
        return
    raise ValueError(
        f"the weights were saved {'with' if published else 'without'} positions ({_POSITIONS}); "
        f"build the module with add_pos_enc={published}"
    )
