"""Networks made of torch's own layers: `to_plain`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ttcompress.commands.in_memory import speaking_python
from ttcompress.measure.plain_forms import fastest
from ttcompress.networks.held import copied
from ttcompress.networks.plain import plain_network
from ttcompress.networks.running import Example, NetworkInput


def to_plain(
    module: nn.Module,
    *,
    input_size: Sequence[int] = (),
    example: NetworkInput | None = None,
    batch_size: int = 1,
    tune: bool = False,
) -> nn.Module:
    """Make a network of torch's own layers of one with TT layers; the module itself stays as it is.

    A TT layer whose cores are the cheaper way becomes an nn.Sequential of two or three convolutions or Linears, one
    that runs dense becomes the dense layer. Nothing is looked up at run time and nothing is held twice, so that the
    result goes through torch.compile, torch.export, torch.jit.trace and int8 quantisation as any network does. A
    Linear in the format `matrix` that is cheaper by its cores becomes a `ContractedLinear`: Linears with axes turned
    between them (docs/speed.md).

    Args:
        module: what `compress` or `load` returned, or any other module with TT layers in it, in eval mode or not. What
            is cheaper is asked for the device that it is on.
        input_size: of one input, without the batch, such as (3, 224, 224); convolutions need it.
        example: a batch that the network takes, instead of a size.
        batch_size: how many inputs a call is going to have: what is faster depends on it.
        tune: measure each layer on its device and with torch's number of threads, instead of asking the cost model.

    Raises:
        ArchitectureError: convolutions, and no size of an input.
        DataError: an input that the network does not take.
        PlanError: a batch size below 1.

    >>> import torch, ttcompress
    >>> net = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    >>> small, report = ttcompress.compress(net, ranks=8, format="lowrank")
    >>> plain = ttcompress.to_plain(small, input_size=(512,))
    >>> plain[0]
    Sequential(
      (0): Linear(in_features=512, out_features=8, bias=False)
      (1): Linear(in_features=8, out_features=512, bias=True)
    )
    """
    with speaking_python():
        known = Example(tuple(input_size), example) if input_size or example is not None else None
        return plain_network(copied(module), known, batch_size, fastest if tune else None)
