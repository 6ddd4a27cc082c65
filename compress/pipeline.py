"""`compress`: calibrate → candidates → sensitivities → allocation → fuse → export."""

from contextlib import suppress
from pathlib import Path

import torch

from kvfold.compress.export import check_exportable, export
from kvfold.compress.plan import Plan, make_plan, pick_device
from kvfold.compress.processes import PeerLost, Processes
from kvfold.compress.progress import stage
from kvfold.compress.recipe import Recipe
from kvfold.compress.search import search
from kvfold.compress.work import Unfinished, fingerprint, model_fingerprint, work_folder
from kvfold.errors import KvfoldError
from kvfold.exports.loss import REFUSED_KL, loss_words
from kvfold.exports.place import check_output, resolve_output
from kvfold.exports.reader import Artifact
from kvfold.exports.schema import Metadata
from kvfold.exports.spec import LayerSpec
from kvfold.version import __version__


def calibrated_by(plan: Plan, device: torch.device) -> dict:
    """What a calibration depends on, as plain data."""
    return {
        "kvfold": __version__,
        "model": model_fingerprint(plan.source.path),
        "tokens": [s.tolist() for s in plan.sequences],
        "calibration": [plan.steps, plan.recipe.calibration.sample_tokens],
        "device": device.type,
    }


def statistics_folder(calibrated: dict, root: Path) -> Path:
    """The folder in `root` of a calibration that depends on `calibrated`, of `calibrated_by`; made
    if need be."""
    folder = root / fingerprint(calibrated)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_loss(kl: float, accept_loss: bool) -> None:
    """Says what a large KL means, and refuses one that leaves nothing of the model, unless it is accepted.

    Raises:
        Unfinished: it is above REFUSED_KL nats and not accepted.
    """
    words = loss_words(kl)
    if words and kl > REFUSED_KL and not accept_loss:
        raise Unfinished(
            f"{words} Nothing was written: run again with more --budget, or with --resume --accept-loss to have it "
            f"all the same (above {REFUSED_KL:g} nats)."
        )
    if words:
        stage(f"warning: {words}")


def compress(
    model: str,
    budget: str,
    out: Path,
    *,
    calib: str | None = None,
    recipe: Recipe | None = None,
    device: str = "auto",
    context: int | None = None,
    resume: bool = False,
    statistics: Path | None = None,
    max_memory: int | None = None,
    accept_loss: bool = False,
) -> Artifact:
    """Compresses a model and writes the artifact.

    Several processes that have joined (launch.py) call it together, with the same arguments: process
    0 writes, and all return the same. Each reads the model for itself.

    Args:
        model: alias, folder, .gguf or Hub id.
        budget: "2.5" or "512MiB@32768".
        out: the artifact's folder.
        calib: text file or datasets id; None for the built-in text.
        recipe: choices; None for the defaults.
        device: "auto", "cpu", "cuda", ….
        context: tokens at which plain bits count.
        resume: go on with what an interrupted run of the same options left.
        statistics: folder that keeps the calibration for later runs on the same model and text,
            whatever else they choose.
        max_memory: bytes that are taken to be free; None: those that are. Weights of which half
            would not fit are read layer by layer. The artifact is the same. Processes of one host
            share them.
        accept_loss: write the artifact also where the measured KL is above REFUSED_KL nats.
    Raises:
        KvfoldError: any bad input, in one sentence; nothing is left behind.
        Unfinished: the model would be broken, or the artifact can't be written; what was found
            stays for `resume`.
    """
    recipe = recipe or Recipe()
    place = resolve_output(out)  # once: what happens to a link while the run lasts moves nothing
    processes = Processes.current()
    processes.agree(
        {
            "MODEL": model,
            "--budget": budget,
            "--calib": str(calib),
            "--context": str(context),
            "The recipe, by its sha256,": fingerprint(recipe.model_dump(mode="json"))[:12],
        }
    )
    plan = processes.in_turn(lambda: make_plan(model, budget, calib, recipe, context, max_memory))
    if processes.first:
        files = [p for p in plan.source.path.glob("*.safetensors") if p.is_file()]
        check_output(out, int(2.2 * sum(p.stat().st_size for p in files)) + (64 << 20))
    target = pick_device(device)
    calibrated = calibrated_by(plan, target)
    rest = {
        "recipe": recipe.model_dump(mode="json"),
        "budget": [plan.budget.at, plan.budget.nbytes],
    }
    processes.agree(
        {
            "The device": target.type,
            "The version of kvfold": __version__,
            "The version of PyTorch": torch.__version__,
            "The model, by the sha256 of its files,": fingerprint(calibrated["model"])[:12],
            "The text, by the sha256 of its tokens,": fingerprint({"": calibrated["tokens"]})[:12],
        }
    )
    if not processes.first:
        with torch.no_grad():
            search(plan, place, target)  # writes nothing there
        fields, specs = processes.broadcast(("", list[LayerSpec]()))
        return Artifact(place, Metadata.model_validate_json(fields), specs)
    kept = None
    if statistics is not None:
        kept = statistics_folder(calibrated, statistics)
    with work_folder(place, fingerprint(calibrated | rest), resume) as work, torch.no_grad():
        check_exportable(plan, work)
        found = search(plan, work, target, kept)
        check_loss(found.kl, accept_loss)
        try:
            artifact = export(plan, found, place)
        except KvfoldError as error:
            raise Unfinished(
                f"{error} What was found is kept in '{work}': run the same command again with --resume."
            ) from error
    with suppress(PeerLost):  # the artifact is there all the same
        processes.broadcast((artifact.metadata.model_dump_json(), artifact.specs))
    return artifact
