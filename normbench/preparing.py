"""What all sessions of a setting share, made once in a process and off every clock: built and tried out."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normbench import device as machine
from normbench import interrupt, ranks
from normbench.building import build, norm_layers_of, state_of
from normbench.config import Config
from normbench.data.loading import Data, load
from normbench.data.options import DatasetOptions
from normbench.data.together import batches_of
from normbench.graphed import GraphedStep, why_not
from normbench.manifest import Observation, idle_options, kernels_of, observe
from normbench.optim import Schedule, make_optimizer
from normbench.packing import PackedDropout, of_one, own_models, packed
from normbench.seeds import Seeds
from normbench.traces.features import FeatureWatch
from normbench.traces.norms import NormWatch, steps_between
from normbench.training import (
    Prepared,
    autocast,
    evaluate,
    gradients_of,
    settings_of,
    start,
    train_step,
    update,
)
from normbench.values import Refused


def prepare(config: Config) -> Prepared:
    """Build, move and observe what all sessions of a setting share; off every clock."""
    machine.tune_allocator()
    device = machine.pick(config.device)
    machine.use_threads(config.threads)
    optim = config.optim
    data = load_data(config)
    interrupt.obey()
    model = build(config).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    first_state = {name: tensor.detach().clone() for name, tensor in state_of(model)}
    models = [model]
    if config.pack:
        one, model = model, packed(model, config.pack)
        models = own_models(one, model, config.pack)
    steps_per_epoch = data.train.steps_per_epoch
    total_steps = config.steps or (config.epochs or 0) * steps_per_epoch
    schedule = Schedule(
        optim["schedule"],
        lr=optim["lr"],
        momentum=optim.get("momentum"),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        samples=data.train.num_samples,
        batch_size=config.batch["size"],
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    ready = Prepared(
        config=config,
        device=device,
        model=model,
        models=models,
        step_model=model,
        parallel=None,
        optimizer=make_optimizer(optim, model, norm_layers_of(model).values()),
        schedule=schedule,
        scaler=scaler,
        data=data,
        total_steps=total_steps,
        first_state=first_state,
        first_scale=scaler.state_dict(),
        observation=Observation({}),
    )
    watch(ready)
    with settings_of(config, device):
        look(ready)
    return ready


def watch(ready: Prepared) -> None:
    """What traces look at. A compiled model calls no hooks: what layers measure and hand on stays unseen."""
    config, data, hooked = ready.config, ready.data, not ready.config.compile
    if "norms" in config.trace and ranks.first():
        ready.norm_watch = NormWatch(
            ready.model,
            ready.models[0],
            config.traces,
            every=steps_between(config.traces_every, data.train.steps_per_epoch),
            seats=len(ready.models),
            hooked=hooked,
        )
    if "features" in config.trace:
        images = (data.val or data.test).num_samples
        ready.feature_watch = FeatureWatch(ready.models[0], config.traces, hooked=hooked, images=images)


def check_device(config: Config) -> None:
    """Refused where this machine's device cannot do what is asked."""
    device = machine.pick(config.device)
    if config.cuda_graph and device.type != "cuda":
        got = f"device={config.device}, which is {device} here"
        raise Refused(f"cuda_graph=true needs a CUDA device, got {got}; leave cuda_graph out")


def load_data(config: Config) -> Data:
    """The data set on the device; what was read before in this process is shared."""
    return load(
        DatasetOptions.from_mapping(config.dataset),
        data_dir=config.data_dir,
        device=machine.pick(config.device),
        batch_size=config.batch["size"],
        eval_batch_size=config.batch["eval_size"],
        seed=config.seed,
        channels_last=config.channels_last,
        cut=ranks.Cut.here(config.batch["size"], config.batch["micro"]),
    )


def look(ready: Prepared) -> None:
    """Observe the norm layers in one training and one evaluation step, then compile and share out if asked.

    Leaves the model in a used state: every session writes its own start first.
    """
    seeds = [Seeds(ready.config.seed, 0)] * len(ready.models)
    start(ready, *seeds)
    x, y = next(batches_of(ready.data.train, seeds, epoch=1))

    def eval_step() -> None:
        with torch.no_grad(), autocast(ready):
            ready.model(x)

    layers = norm_layers_of(ready.model)
    ready.observation = observe(ready.model, layers, lambda: train_step(ready, x, y), eval_step)
    if ready.config.pack:
        of_one(ready.observation.layers, ready.models[0], len(ready.models))
    interrupt.obey()
    unused = any(p.requires_grad and p.grad is None for p in ready.model.parameters())
    start(ready, *seeds)
    ready.observation.idle = idle_options(ready.config.norm, ready.observation.layers)
    if ready.config.compile:
        ready.step_model = cast(nn.Module, torch.compile(ready.model))
    if ranks.size() > 1:
        own = [ready.device] if ready.device.type == "cuda" else None
        ready.parallel = DistributedDataParallel(ready.step_model, own, find_unused_parameters=unused)
    if ready.config.compile:
        meet_every_size(ready, x, y)
    record_steps(ready, x, y)
    if ready.config.compile or ready.graphed:
        ready.observation.kernels = kernels_of(lambda: train_step(ready, x, y), ready.device)


def record_steps(ready: Prepared, x: Tensor, y: Tensor) -> None:
    """Record the training step for every batch size that will come, where that is possible and wanted.

    What cannot be recorded is run as it is, and `ready.not_graphed` says why. Untested on CUDA.
    """
    config, train = ready.config, ready.data.train
    layers = norm_layers_of(ready.model).values()
    why = why_not(ready.device, layers, parts=train.cut.parts, compiled=config.compile)
    if why is None and any(isinstance(layer, PackedDropout) for layer in ready.model.modules()):
        why = "each session of a pack draws its own dropout"
    if why is not None and config.cuda_graph:
        raise Refused(f"cuda_graph=true: {why}; leave cuda_graph out")
    if why is not None or config.cuda_graph is False:
        wanted = ready.device.type == "cuda" and not config.compile and config.cuda_graph is None
        ready.not_graphed = why if wanted else None
        return

    def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return gradients_of(ready, x, y, None, None)

    parameters = [p for group in ready.optimizer.param_groups for p in group["params"]]
    graphed = GraphedStep(gradients, lambda: update(ready), parameters)
    state = [tensor for _, tensor in state_of(ready.model)]
    try:
        for images in {train.images_in(0), train.images_in(train.steps_per_epoch - 1)}:
            graphed.record(x[:images], y[:images], state)
    except RuntimeError as error:  # torch's, of what a graph cannot hold, or ours of a replay that differs
        ready.not_graphed = next(iter(str(error).splitlines()), type(error).__name__)
        if config.cuda_graph:
            raise
        return
    ready.graphed = graphed


def meet_every_size(ready: Prepared, x: Tensor, y: Tensor) -> None:
    """Compile for every batch size that will come, in training and evaluation: each costs a compilation."""
    train_step(ready, x, y)
    train = ready.data.train
    last = train.images_in(train.steps_per_epoch - 1)
    if last < train.images_in(0):
        own = train.cut.own(last)
        n = own.stop - own.start
        train_step(ready, x[:n], y[:n], last)
    if ready.config.pack:
        return  # it evaluates its sessions' own models, as they are
    for part in filter(None, (ready.data.val, ready.data.test)):
        evaluate(ready, part)
