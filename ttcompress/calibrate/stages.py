"""The stages of a calibrated compression, each kept only if held-out calibration images say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor, nn

from ttcompress.calibrate.batch_norm import recalibrate_batch_norm
from ttcompress.calibrate.decompose import decompose, swap_in, weight_only
from ttcompress.calibrate.from_afar import keeps_little, refine_from_afar
from ttcompress.calibrate.held_out_errors import network_error, output_errors
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.refine import refine
from ttcompress.calibrate.room import thrift
from ttcompress.calibrate.sweeps import sweep_layers
from ttcompress.calibrate.tables import Unseen, unseen_rows
from ttcompress.errors import DataError
from ttcompress.networks.held import copied
from ttcompress.networks.surgery import install, store_cores
from ttcompress.networks.weights import cores_of, parameter_of, tied_names, weight_of
from ttcompress.records.common import Json, Progress
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.decompose import frobenius_norm
from ttcompress.tt.spool import Spool


@dataclass(frozen=True)
class Effort:
    """How many least-squares sweeps over each layer, and how many steps of joint refinement.

    `far` are the steps of the long refinement where TT-SVD keeps little.
    """

    sweeps: int
    steps: int
    far: int = 0


EFFORTS = {"fast": Effort(1, 0, 0), "default": Effort(1, 150, 1000), "max": Effort(2, 400, 4000)}


class Stages:
    """The best network so far, and what each stage was worth.

    `errors` holds by fqn and stage the relative output error; a stage that was not kept has none. `unseen` are the
    rows of tables that no stage may give up.
    """

    def __init__(self, reference: Reference, plan: CompressionPlan) -> None:
        self.model = copied(reference.dense)
        self.log: list[Json] = []
        self.errors: dict[str, dict[str, float]] = {layer.fqn: {} for layer in plan.layers}
        self.unseen: Mapping[str, Unseen] = {}
        self._reference, self._dense, self._plan = reference, reference.dense, plan
        self._least = inf

    def run(self, name: str, change: Callable[[nn.Module], object]) -> None:
        """Change the best network; where it comes no nearer to the dense network by that, undo the change.

        The first stage is kept whatever comes of it: it is what makes the network smaller. Later ones change values
        alone.
        """
        with thrift(each.num_bytes for each in self._reference.statistics.values()):
            self._run(name, change)

    def _run(self, name: str, change: Callable[[nn.Module], object]) -> None:
        is_first = not self.log
        undo = {} if is_first else _values_of(self.model)

        if change(self.model) is False:
            return
        # Those that a training leaves have the memory of a network.
        self.model.zero_grad()

        error = self._error()
        is_better = (error < self._least and self._keeps_unseen()) or is_first
        self.log.append({"stage": name, "error": error if isfinite(error) else None, "kept": is_better})
        if not is_better:
            _put_back(self.model, undo)
            return

        self._least = error
        by_layer = output_errors(self._dense, self.model, self._plan, self._reference.calibration)
        for fqn, missed in by_layer.items():
            self.errors[fqn][name] = missed

    def _keeps_unseen(self) -> bool:
        return all(each.error(self._dense, self.model) <= each.bound for each in self.unseen.values())

    def _error(self) -> float:
        try:
            return network_error(self._dense, self.model, self._reference.calibration)
        except DataError:
            return inf


def _values_of(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """All values of a network, by name, laid aside."""
    spool = Spool()
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: spool.lay(tensor.detach().clone()) for name, tensor in named}


@torch.no_grad()
def _put_back(model: nn.Module, values: Mapping[str, Callable[[], Tensor]]) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(values[name]())


@torch.enable_grad()
def compress_calibrated(
    reference: Reference, plan: CompressionPlan, effort: str, seed: int, progress: Progress | None = None
) -> tuple[nn.Module, CompressionPlan, list[Json]]:
    """The compressed network, the plan with the errors of every stage, and the log of the stages.

    The last stage that came nearer to the dense network on held-out images is the result.
    """
    dense, calibration = reference.dense, reference.calibration
    stages = Stages(reference, plan)
    amount = EFFORTS[effort]

    def whitened(weight: Tensor, layer: LayerPlan) -> list[Tensor]:
        return decompose(weight, layer, reference.statistics[layer.fqn])

    stages.run("weights", lambda model: _decompose_all(model, reference, plan, weight_only, progress))
    is_far = amount.far > 0 and keeps_little(dense, stages.model, plan)
    # Held only where it is gone back to: it has the memory of a network.
    plain = copied(stages.model) if is_far else None
    stages.unseen = unseen_rows(dense, stages.model, plan, reference.statistics)
    stages.run("whitened", lambda model: _decompose_all(model, reference, plan, whitened, progress))
    if amount.sweeps:
        stages.run("sweeps", lambda model: sweep_layers(reference, model, plan, amount.sweeps, progress))
    if progress:
        progress("recalibrating batch norms", 0, 0)
    stages.run("batch norm", lambda model: recalibrate_batch_norm(model, calibration))
    if amount.steps:
        stages.run("refinement", lambda model: refine(reference, model, amount.steps, seed, progress))

    if plain is not None:
        stages.run(
            "from afar",
            lambda model: refine_from_afar(reference, model, plain, plan, amount.far, seed, progress),
        )

    # Rounded to the type that a file stores, so that the errors are those of what is stored.
    store_cores(stages.model, plan)
    return stages.model, _with_errors(plan, dense, stages), stages.log


def _with_errors(plan: CompressionPlan, dense: nn.Module, stages: Stages) -> CompressionPlan:
    layers = []
    for layer in plan.layers:
        relative_error = _relative_error(dense, stages.model, layer)
        unseen = stages.unseen.get(layer.fqn)
        note = unseen.note(unseen.error(dense, stages.model)) if unseen else ""
        layers.append(
            replace(
                layer,
                relative_error=relative_error,
                output_error=stages.errors[layer.fqn],
                note="; ".join(each for each in (layer.note, note) if each),
            )
        )
    return plan.with_layers(layers)


def _decompose_all(
    model: nn.Module,
    reference: Reference,
    plan: CompressionPlan,
    cores_of: Callable[[Tensor, LayerPlan], list[Tensor]],
    progress: Progress | None,
) -> None:
    """Each layer by itself, what it misses in the mean taken up where something can."""
    dense = reference.dense
    for done, layer in enumerate(plan.layers):
        if progress:
            progress(f"decomposing {layer.fqn}", done, len(plan.layers))
        weight, statistics = weight_of(dense, layer), reference.statistics[layer.fqn]
        swap_in(model, dense, layer, cores_of(weight, layer))
        if statistics.shift:
            mean = statistics.inputs.means[0]
            missed = weight - weight_of(model, layer)
            statistics.shift.move(model, dense, missed.flatten(1).to(mean) @ mean)


def _relative_error(dense: nn.Module, model: nn.Module, layer: LayerPlan) -> float:
    weight, ours = weight_of(dense, layer), weight_of(model, layer)
    norm = frobenius_norm(weight)
    return frobenius_norm(weight - ours) / norm if norm else 0.0


@torch.no_grad()
def adopt(model: nn.Module, compressed: nn.Module, plan: CompressionPlan) -> None:
    """Give a network the layers and values of its compressed copy.

    Its own device and, but for cores, types stay.
    """
    aliases = tied_names(model)
    for layer in plan.layers:
        own = parameter_of(model, layer)
        cores = [core.to(own.device) for core in cores_of(compressed, layer)]
        install(model, model, layer, cores, aliases.get(layer.weight_name, ()))

    # Biases were fitted too, and batch norms calibrated.
    values = compressed.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(values[name])
