"""``pyro-seq fit`` and ``pyro-seq evaluate``."""

from __future__ import annotations

import argparse
import ast
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["add_commands"]

_FIT = """\
Train a model of the literature and a guide on piano rolls, once for each seed, and evaluate on the test split with the
weights that were best on the validation split. The run lives in a folder: the same command goes on where it was
interrupted, to the same numbers. Under torchrun, each process takes its share of every batch."""

_EVALUATE = """\
Evaluate the runs of a folder that `pyro-seq fit` made. Prints negative log likelihoods, bounded by the ELBO and by a particle
filter with the guide as its proposal, in nats per frame; all frames scored, padding not."""

_TRAINING = {  # options of pyro_seq.fit that the command has as its own, with their defaults
    "epochs": 100, "batch_size": 20, "learning_rate": 3e-3, "schedule": "cosine", "warmup": 50, "clip": 5.0,
    "weight_decay": 0.0, "averaging": 0.99, "window": None, "normalise": "data", "every": 1,
    "patience": None}
_CHOICES = {"schedule": ("cosine", "constant"), "normalise": ("data", "batch")}
_DATA = ("jsb", "nottingham", "musedata", "piano_midi")
_ANNEALING = 20  # of the ELBO; for the other losses there is none
_SETTINGS = {"model", "guide", "loss", "num_particles", "data", "checksums", "model_options", "guide_options", "loss_options",
             "training"}


def add_commands(commands: Any) -> None:
    """Add both commands to a parser's subparsers."""
    from pyro_seq.fit.registry import GUIDES, LOSSES, MODELS

    fit = commands.add_parser("fit", help="train a model on piano rolls", description=_FIT,
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    fit.add_argument("--model", choices=sorted(MODELS), default="dmm", help="the model")
    fit.add_argument("--guide", choices=sorted(GUIDES), default="own", help="its guide; own is the published inference")
    fit.add_argument("--loss", choices=sorted(LOSSES), default="elbo", help="the bound that is raised")
    fit.add_argument("--num-particles", type=int, default=1, metavar="N", help="of the loss")
    fit.add_argument("--data", default="jsb", metavar="NAME|FOLDER",
                     help=f"{', '.join(_DATA)}, or a folder of MIDI files")
    fit.add_argument("--output", type=Path, default=argparse.SUPPRESS, metavar="FOLDER",
                     help="of the run (default: runs/DATA-MODEL-GUIDE, and -LOSS-PARTICLES if not the ELBO of one)")
    fit.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one training run each")
    fit.add_argument("--model-option", action=_Option, default={}, metavar="NAME=VALUE", help="e.g. latent=32; repeatable")
    fit.add_argument("--guide-option", action=_Option, default={}, metavar="NAME=VALUE", help="e.g. iterations=2; repeatable")
    fit.add_argument("--loss-option", action=_Option, default={}, metavar="NAME=VALUE",
                     help="e.g. ess_threshold=1.0; repeatable")
    fit.add_argument("--kl-annealing", type=int, default=argparse.SUPPRESS, metavar="N",
                     help=f"see pyro_seq.fit (default: {_ANNEALING} for the ELBO, which alone can be annealed)")
    for name, default in _TRAINING.items():
        fit.add_argument("--" + name.replace("_", "-"), type=int if default is None else type(default), default=default,
                         metavar=None if name in _CHOICES else "N", choices=_CHOICES.get(name), help="see pyro_seq.fit")
    fit.set_defaults(run=_fit)

    evaluate = commands.add_parser("evaluate", help="score the runs of a folder", description=_EVALUATE,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    evaluate.add_argument("folder", type=Path, help="made by pyro-seq fit")
    evaluate.add_argument("--split", choices=("train", "valid", "test"), default="test", help="of the data")
    for command in (fit, evaluate):
        command.add_argument("--samples", type=int, default=10, metavar="N", help="draws of the ELBO")
        command.add_argument("--particles", type=int, default=128, metavar="N", help="of the particle bound; 0 leaves it out")
        command.add_argument("--device", default="cpu", help="cpu or cuda")
    evaluate.set_defaults(run=_evaluate)


class _Option(argparse.Action):
    """Collects NAME=VALUE into a dict, values as Python literals or else strings."""

    def __call__(self, parser: Any, namespace: Any, text: Any, option_string: str | None = None) -> None:
        name, found, value = text.partition("=")
        if not found or not name:
            parser.error(f"{option_string} {text!r} is not NAME=VALUE")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: value})


def _load(name: str) -> Any:
    from pyro_seq.data import load_midi, load_polyphonic

    return load_midi(name) if name not in _DATA and Path(name).is_dir() else load_polyphonic(name)


def _checksums(data: Any) -> dict[str, int]:
    from pyro_seq.fit.train import checksum

    return {split: checksum(getattr(data, split)) for split in ("train", "valid", "test")}


def _check(given: argparse.Namespace) -> None:
    """What would else be found only after hours of training, or by torch with a traceback."""
    import torch

    from pyro_seq.module import require_count

    require_count("samples", given.samples, 1)
    require_count("particles", given.particles, 0)
    if given.device == "cuda" and "LOCAL_RANK" in os.environ:  # each process that torchrun starts has a GPU of its own
        given.device = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, _, number = given.device.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdigit():
        raise ValueError(f"--device {given.device}: it is cpu, cuda, or one GPU of several, such as cuda:1")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {given.device}: torch finds {torch.cuda.device_count()} GPUs here")


def _build(settings: dict[str, Any], data: Any, device: str, seed: int) -> tuple[Any, Any]:
    """The untrained model and guide of one run."""
    import torch

    from pyro_seq.fit.registry import make_guide, make_model
    from pyro_seq.models import match_marginals

    torch.manual_seed(seed)
    train = data.train
    model = make_model(settings["model"], train.x["x"].shape[-1], settings["model_options"])
    match_marginals(model, train)
    like = train.select(range(min(50, train.num_sequences)))
    guide = make_guide(settings["guide"], model, settings["guide_options"], like)
    return model.to(device), guide.to(device)


def _fit(given: argparse.Namespace) -> int:
    import torch

    from pyro_seq.fit.parallel import launched, rank
    from pyro_seq.fit.registry import make_loss
    from pyro_seq.fit.train import fit

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # On tensors this small, several threads mostly wait for each other.
    _check(given)
    annealing = getattr(given, "kl_annealing", _ANNEALING if given.loss == "elbo" else 0)
    settings = {"model": given.model, "guide": given.guide, "loss": given.loss, "num_particles": given.num_particles,
                "data": given.data, "model_options": given.model_option, "guide_options": given.guide_option,
                "loss_options": given.loss_option,
                "training": {"kl_annealing": annealing, **{name: getattr(given, name) for name in _TRAINING}}}
    loss = make_loss(given.loss, given.num_particles, given.loss_option)
    name = f"{Path(given.data).resolve().name}-{given.model}-{given.guide}"
    if (given.loss, given.num_particles) != ("elbo", 1):
        name += f"-{given.loss}-{given.num_particles}"
    folder = getattr(given, "output", Path("runs") / name)
    with launched(torch.device(given.device)):
        data = _load(given.data)  # before the folder is made: a name may be misspelt
        settings["checksums"] = _checksums(data)
        settings = json.loads(json.dumps(settings))  # as they will be read again: a tuple is a list there
        _claim(folder, settings)
        for seed in given.seeds:
            model, guide = _build(settings, data, given.device, seed)
            result = fit(model, guide, data.train.to(given.device), valid=data.valid.to(given.device), loss=loss, seed=seed,
                         checkpoint=folder / f"seed-{seed}.ckpt", **settings["training"])
            if rank() == 0:
                result.history.to_csv(folder / f"seed-{seed}.csv", index=False)
        first = rank() == 0
    if not first:
        return 0
    given.folder, given.split = folder, "test"
    return _evaluate(given)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a folder without checkpoints, or check that one with them has the same."""
    path = folder / "settings.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; it is the folder of the run")
    if _checkpoints(folder):
        there, here = _flat(_settings(folder)), _flat(settings)
        differ = [f"{k} is {there.get(k)!r} there, {here.get(k)!r} here" for k in sorted({*there, *here})
                  if there.get(k) != here.get(k)]
        if differ:
            raise ValueError(f"{folder} holds a run with other settings: {'; '.join(differ)}. Use the same ones to go on, or "
                             "another --output to begin anew")
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(temporary, path)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings one by one, those within another by both names."""
    return {key: value for name, part in settings.items() for key, value in
            ({f"{name}.{k}": v for k, v in part.items()} if isinstance(part, dict) else {name: part}).items()}


def _checkpoints(folder: Path) -> list[Path]:
    """By seed."""
    found = [path for path in folder.glob("seed-*.ckpt") if path.stem[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.stem[5:]))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict) or set(settings) != _SETTINGS:
            raise ValueError(f"{path} is not as `pyro-seq fit` writes it, with {sorted(_SETTINGS)}: delete the folder and "
                             "train again")
        return settings
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} has no settings.json: it is not a folder that `pyro-seq fit` made") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder and train again") from None


def _evaluate(given: argparse.Namespace) -> int:
    import pandas as pd

    from pyro_seq.fit.evaluate import evaluate
    from pyro_seq.fit.registry import make_loss
    from pyro_seq.fit.train import restore

    _check(given)
    settings = _settings(given.folder)
    checkpoints = _checkpoints(given.folder)
    if not checkpoints:
        raise ValueError(f"{given.folder} holds no checkpoint seed-N.ckpt yet: run `pyro-seq fit` first")
    data = _load(settings["data"])
    if changed := [split for split, found in _checksums(data).items() if settings["checksums"][split] != found]:
        raise ValueError(f"the data {settings['data']!r} are not those that {given.folder} was trained on: the checksums of "
                         f"{changed} differ. Bring the files back, or train again in another folder")
    tables = {}
    for path in checkpoints:
        seed = int(path.stem[5:])
        model, guide = _build(settings, data, given.device, seed)
        result = restore(model, guide, path)
        table = evaluate(model, guide, getattr(data, given.split).to(given.device), num_samples=given.samples,
                         num_particles=given.particles, progress=True)
        tables[seed] = table.assign(epoch=result.best_epoch)
    table = pd.concat(tables, names=["seed", "bound"])
    print(f"\n{settings['model']} with guide {settings['guide']} on {settings['data']}, {given.split} split. Negative log "
          "likelihood in nats per frame,\nbounded from above: all frames scored, the first from an empty past.")
    print(f"Trained by {make_loss(settings['loss'], settings['num_particles'], settings['loss_options'])}.\n")
    print(table.to_string(float_format="{:.4f}".format))
    if len(tables) > 1:
        values = table["nats per frame"].groupby("bound", sort=False)
        summary = pd.DataFrame({"mean": values.mean(), "std over seeds": values.std()})
        print("\n" + summary.to_string(float_format="{:.4f}".format))
    return 0
