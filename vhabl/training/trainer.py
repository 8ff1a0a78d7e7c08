"""The only training loop: select the number of epochs on a validation split, then train on all.

Training has two phases over the same loop. `select` trains on the training items without the
validation queries and scores each few epochs; `final` trains anew on all training items for the
number of epochs that scored best. Without a validation split there is only `final`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from zipfile import ZipFile

import torch
from tqdm import tqdm

from vhabl.config import Config, build_method, first_difference, flat, from_yaml, to_yaml
from vhabl.data import validation_split
from vhabl.data.images import read
from vhabl.encoders import digest_of
from vhabl.evaluation.records import batches_in_order, validation_score
from vhabl.methods.base import HashingMethod
from vhabl.system.distributed import ALONE, Ranks
from vhabl.system.errors import Stopped, VhablError, bad_value, brief, fail
from vhabl.system.files import atomic_path, check_archive
from vhabl.training.feature_cache import frozen_outputs
from vhabl.training.interrupts import StopRequests
from vhabl.training.optim import WeightMean, build_optimizer, clip_gradients, set_rate
from vhabl.training.tensorboard import ScalarLog
from vhabl.types import Batch, CropStore, Dataset, Inputs, Rows

STATE_FILE = "state.pt"
RESIDENT = 2**30  # bytes of inputs up to which the training items stay on the device


@dataclass
class Progress:
    """How far a run is: all that decides what happens next, beside the tensors."""

    phase: str = "select"
    epoch: int = 0  # finished epochs of this phase
    best_epoch: int = 0
    best_score: float = -1.0
    stale: int = 0  # validations since the best one
    history: list[dict[str, Any]] = field(default_factory=list)


def pick_device(name: str) -> torch.device:
    """The device of a recipe; a GPU with a number is from then on what `cuda` means, and float32
    is float32 there too. Raises VhablError where CUDA is asked for and absent.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        bad_value("device", repr(name), "auto, cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        bad_value("device", repr(name), "auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            fail(f"device {name!r}", f"{count} CUDA devices are here", "Choose one that exists")
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


class Trainer:
    """Trains one method on one data set in one run folder.

    Of several ranks, each reads and encodes its share of a batch, and computes the loss of all of
    it: whatever a loss or a layer takes over items is taken over the whole batch, on any number of
    ranks. They draw the same random numbers and hold the same weights; rank 0 decides and writes.
    """

    def __init__(
        self, config: Config, data: Dataset, progress_bar: bool = True, here: Ranks = ALONE
    ) -> None:
        self.config = config
        self.here = here
        self.data = data  # later with what a frozen encoder makes of it
        self.spec = data.spec
        self.device = pick_device(here.device(config.device))
        self.progress_bar = progress_bar
        self.state_path = config.run_folder / STATE_FILE
        self.log_folder = config.run_folder / "tensorboard"
        self.progress = Progress()
        if config.validation.fraction == 0:
            self.progress.phase = "final"
        if config.threads:
            torch.set_num_threads(config.threads)

    def run(self) -> HashingMethod:
        """Train to the end, going on from the saved state where `resume` says so."""
        # Numbers below 1e-38 cost a processor many times the work of others, and vanishing
        # gradients fill the optimiser's state with them: a quarter of the time on Wiki.
        torch.set_flush_denormal(True)
        try:
            return self._run()
        finally:
            torch.set_flush_denormal(False)

    def _run(self) -> HashingMethod:
        saved = self.read_state() if self.config.resume else None
        if saved is not None:
            self.progress = Progress(**saved["progress"])
        while True:
            self.begin()
            begins = saved is None and not self.progress.history  # and nothing was refused
            if begins and self.here.rank == 0:
                shutil.rmtree(self.log_folder, ignore_errors=True)
            if saved is not None:
                self.restore(saved)
                saved = None
            self.train_phase()
            if self.progress.phase == "final":
                break
            self.progress.phase, self.progress.epoch = "final", 0
        return self._finished_copy()

    # -- one phase -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Fresh weights, optimiser and random streams for the phase in `self.progress`."""
        config, phase = self.config, self.progress.phase
        torch.manual_seed(config.seed)
        self.shuffle = torch.Generator().manual_seed(config.seed)
        v = config.validation
        method = build_method(config, self.spec)
        self.begun_with = digest_of(method.encoder.state_dict().items())
        method.to(self.device)
        method.encoder.share_out(self.here)
        self.data = frozen_outputs(method.encoder, self.data, config.encoder, self.progress_bar)
        self.held_out = (
            validation_split(self.data, v.fraction, v.seed) if phase == "select" else None
        )
        self.train = self.held_out.train if self.held_out is not None else self.data.train
        self.epochs = config.epochs
        if phase == "final" and v.fraction > 0:
            self.epochs = self.progress.best_epoch
        method.encoder.fit(self.train, config.data.scale)
        self.method = method
        self.labels = torch.from_numpy(self.train.labels).float().to(self.device)
        of_texts = self.train.text_labels
        self.text_labels = (
            None if of_texts is None else torch.from_numpy(of_texts).float().to(self.device)
        )
        self.method.prepare(self.labels)
        # What is small against a device's memory stays there for the whole phase.
        drawn = self._has_choices() or self.has_crops()
        small = self.train.bytes <= RESIDENT and not drawn
        self.resident = self.train.inputs().to(self.device) if small else None
        named = self.method.named_parameters()
        self.optimizer = build_optimizer(self.method.param_groups(), named, config.optim)
        eta = config.optim.averaging
        self.mean = WeightMean(self.method, eta) if eta else None

    def train_phase(self) -> None:
        progress, config = self.progress, self.config
        title = f"{self.method.title} seed {config.seed} {progress.phase}"
        bar = tqdm(
            total=self.epochs,
            initial=progress.epoch,
            desc=title,
            unit="epoch",
            disable=None if self.progress_bar else True,  # None: at a terminal alone
        )
        log = self._log()
        with bar, StopRequests("this epoch", self.here.size == 1) as requests:
            while progress.epoch < self.epochs and not self._stopped():
                terms = self.train_epoch()
                progress.epoch += 1
                row = {"phase": progress.phase, "epoch": progress.epoch, **terms}
                if self.held_out is not None and progress.epoch % config.validation.every == 0:
                    row["validation"] = self._validate()
                progress.history.append(row)
                if log is not None:
                    log.add(progress.epoch, {k: v for k, v in row.items() if isinstance(v, float)})
                shown = {"loss": f"{terms['loss']:.3f}"}
                if progress.best_epoch:
                    shown["best"] = f"{progress.best_score:.4f}@{progress.best_epoch}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
                asked = max(self.here.gather(requests.signal))
                if progress.epoch % config.save_every == 0 or asked:
                    self.save_state()
                if asked:
                    done = f"epoch {progress.epoch} of {self.epochs} ({progress.phase})"
                    raise Stopped(f"stopped after {done}; resume=true goes on", asked)
        if self.held_out is not None and not progress.best_epoch:  # fewer epochs than `every`
            progress.history[-1]["validation"] = self._validate()

    def _log(self) -> ScalarLog | None:
        """Where rank 0 logs losses. Epochs after the saved state are trained again: what was logged
        of them no longer counts.
        """
        if self.here.rank > 0:
            return None
        return ScalarLog(self.log_folder / self.progress.phase, self.progress.epoch + 1)

    def _stopped(self) -> bool:
        patience = self.config.validation.patience
        return self.held_out is not None and 0 < patience <= self.progress.stale

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training items in a new random order; the mean of each loss term."""
        self.method.train()
        order = torch.randperm(len(self.train), generator=self.shuffle)
        batches = list(order.split(self.config.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2:  # a loss over pairs needs two items
            batches[-2:] = [torch.cat(batches[-2:])]
        total: dict[str, torch.Tensor] = {}
        for number, (rows, inputs) in enumerate(self.inputs(batches)):
            of_texts = None if self.text_labels is None else self.text_labels[rows]
            batch = Batch(inputs, self.labels[rows], rows, of_texts)
            done = self.progress.epoch + number / len(batches)
            set_rate(self.optimizer, self.config.optim, done / self.config.epochs)
            terms = self.method.loss(batch)
            loss = torch.stack(list(terms.values())).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            encoder = self.method.encoder
            encoder.ranks.sum_gradients(encoder.parameters())
            clip_gradients(self.method.parameters(), self.config.optim)
            self.optimizer.step()
            if self.mean is not None:
                self.mean.update(self.method)
            for name, value in {**terms, "loss": loss}.items():
                total[name] = total.get(name, 0) + value.detach()
        self.method.after_epoch()
        self.here.agree(self.method)  # rounding may differ where a device's sums have no order
        sums = torch.stack(list(total.values())).tolist()  # all at once: a GPU is waited for once
        means = {name: value / len(batches) for name, value in zip(total, sums, strict=True)}
        if not all(map(_is_finite, means.values())):
            bad = ", ".join(n for n, v in means.items() if not _is_finite(v))
            raise VhablError(
                f"epoch {self.progress.epoch + 1}: the loss is not finite ({bad}). "
                "Lower optim.lr or set optim.clip"
            )
        return means

    def _has_choices(self) -> bool:
        """Whether items have several captions, of which training draws one."""
        return isinstance(self.train.text, Rows) and self.train.text.count is not None

    def has_crops(self) -> bool:
        """Whether training cuts pictures at random places."""
        image = self.train.image
        there = isinstance(image, Rows) and isinstance(image.store, CropStore)
        return there and self.config.encoder.augment

    def inputs(self, batches: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, Inputs]]:
        """The rows of each batch, and the inputs of those that are this rank's share."""
        part = self.method.encoder.ranks.part
        # All rows at once, as the host waits for each copy.
        there = torch.cat(batches).to(self.device).split([len(rows) for rows in batches])
        if self.resident is not None:
            for rows in there:
                yield rows, self.resident.take(part(rows))
            return
        draws = corners = None
        if self._has_choices():
            draws = [part(torch.rand(len(b), generator=self.shuffle).numpy()) for b in batches]
        if self.has_crops():
            corners = [part(torch.rand(len(b), 2, generator=self.shuffle).numpy()) for b in batches]
        shares = [part(rows.numpy()) for rows in batches]
        found = read(self.train, shares, draws, self.device, corners)
        for rows, inputs in zip(there, found, strict=True):
            yield rows, inputs.to(self.device)

    def _validate(self) -> float:
        assert self.held_out is not None
        score = validation_score(self._finished_copy(), self.held_out, self.config.bits)
        score = self.here.gather(score)[0]
        progress = self.progress
        if score > progress.best_score:
            progress.best_score, progress.best_epoch, progress.stale = score, progress.epoch, 0
        else:
            progress.stale += 1
        return score

    def _finished_copy(self) -> HashingMethod:
        """The method as it would be saved now: averaged weights, calibrated, in evaluation mode."""
        method: HashingMethod = copy.deepcopy(self.mean.model if self.mean else self.method)
        method.eval()
        method.calibrate(batches_in_order(method, self.train))
        return method

    # -- saved state -----------------------------------------------------------------------------

    def save_state(self) -> None:
        if self.here.rank > 0:
            return
        fixed = self._fixed()
        gpus = [self.device] if self.device.type == "cuda" else []

        def changing(model: HashingMethod) -> dict[str, torch.Tensor]:
            """Without what is frozen, which may be a hundred times the rest."""
            return {n: t for n, t in model.state_dict().items() if n not in fixed}

        state = {
            "config": to_yaml(self.config),
            "fingerprint": self.data.fingerprint,
            "progress": vars(self.progress),
            "begun_with": self.begun_with,
            "method": changing(self.method),
            "memory": self._memory(),
            "mean": None if self.mean is None else changing(self.mean.model),
            "mean_updates": 0 if self.mean is None else self.mean.updates,
            "optimizer": self.optimizer.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(gpu) for gpu in gpus],
        }
        with atomic_path(self.state_path) as path:
            torch.save(state, path)

    def read_state(self) -> dict[str, Any] | None:
        """The saved state, or None where there is none. Raises VhablError where it does not fit."""
        if not self.state_path.exists():
            return None
        try:
            check_archive(self.state_path)
            with ZipFile(self.state_path) as archive:  # torch compares no checksum of its own
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"another checksum of {damaged}")
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            theirs, fingerprint = state["config"], state["fingerprint"]
            absent = {"begun_with", "progress", "method", "memory", "mean", "optimizer", "shuffle",
                      "rng", "cuda_rng"} - state.keys()  # fmt: skip
            if absent:
                raise ValueError(f"no {sorted(absent)[0]}")
        except Exception as error:  # damaged bytes raise many types
            do = "resume=false starts again"
            fail(self.state_path, f"the state is damaged ({brief(error)})", do)
        difference = first_difference(flat(from_yaml(theirs, self.state_path)), flat(self.config))
        if difference is not None:
            what = f"{difference[0]} was {difference[1]} and is {difference[2]} now"
            fail(self.state_path, what, "Give the same command, or resume=false")
        if fingerprint != self.data.fingerprint:
            what = f"it was trained on other data than {self.config.data.path} holds now"
            fail(self.state_path, what, "Put them back, or start again with resume=false")
        return state

    def _fixed(self) -> set[str]:
        """Names of the tensors that training leaves as they are."""
        return {f"encoder.{name}" for name, _ in self.method.encoder.fixed_tensors()}

    def _load(self, model: HashingMethod, tensors: dict[str, torch.Tensor]) -> None:
        """Load a saved state, which leaves out what is fixed and nothing else."""
        missing, unknown = model.load_state_dict(tensors, strict=False)
        wrong = [*(set(missing) - self._fixed()), *unknown]
        if wrong:
            do = "It must be a state of this method; resume=false starts again"
            fail(self.state_path, f"no or an unknown {sorted(wrong)[0]}", do)

    def _memory(self) -> dict[str, torch.Tensor]:
        """Buffers that only training needs: they are in no checkpoint of a finished run."""
        kept = self.method.state_dict()
        return {name: b for name, b in self.method.named_buffers() if name not in kept}

    def restore(self, state: dict[str, Any]) -> None:
        if state["begun_with"] != self.begun_with:
            fail(
                self.state_path,
                "the training began with other weights",
                f"Put encoder.weights={self.config.encoder.weights} back, "
                "or start again with resume=false",
            )
        self._load(self.method, state["method"])
        for name, buffer in self._memory().items():
            buffer.copy_(state["memory"][name])
        if self.mean is not None:
            self._load(self.mean.model, state["mean"])
            self.mean.updates = state["mean_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.shuffle.set_state(state["shuffle"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state(state["cuda_rng"][0], self.device)


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
