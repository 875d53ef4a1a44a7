"""`apt-ray registry`: who serves, who served, and what waits or may go.

A running fleet follows what is decided here.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from apt_ray.cli.common import add_command, bar, print_confirmation
from apt_ray.cli.flags import count, number
from apt_ray.config import MAX_DAYS
from apt_ray.files import Location, check_writable, location
from apt_ray.tables import align

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apt_ray.registry import Backup, Registry

_KEPT = 3  # the exit status of a promotion that the champion survived


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    registry = commands.add_parser(
        "registry",
        help="decide which version of a prompt set serves",
        description="Decide which version of a prompt set serves, in an MLflow server.",
    )
    verbs = registry.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_verbs(verbs)
    _add_pending(verbs)
    _add_export(verbs)
    _add_import(verbs)


def add_verbs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that decide on versions, here or under another program's name."""
    _add_promote(commands)
    _add_accept(commands)
    _add_confirm(commands)
    _add_rollback(commands)
    _add_history(commands)
    _add_diff(commands)
    _add_prune(commands)


def register_pending(address: str | None) -> int:
    """Register what waits on this machine, and say what that was; returns the exit status."""
    from apt_ray.registry import default_pending, open_registry

    pending, count = default_pending(), 0
    for version in open_registry(address).register_pending(pending):
        print(f"{version.category}: registered version {version.version}", flush=True)
        count += 1
    print(f"{count} versions registered; none waits in {pending}")
    return 0


def _add_promote(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    promote = add_command(
        commands, "promote", _promote, "let the candidate serve if it beats the champion"
    )
    promote.description = (
        "Compare the candidate with the champion on perturbed normal images that neither was"
        " fitted to, and let it serve if it is better by more than 2 standard errors and by no kind"
        f" of perturbation 2 points worse. Exit status: 0 if it serves now, {_KEPT} if not."
    )
    promote.add_argument("category")
    promote.add_argument(
        "--version",
        default="candidate",
        metavar="ALIAS|N",
        help="what to promote (default: %(default)s)",
    )
    promote.add_argument(
        "--data",
        type=location,
        metavar="DIR",
        help="folder of categories with more normal images to compare on, or s3://bucket/prefix",
    )
    promote.add_argument(
        "--force", action="store_true", help="promote whatever the verdict is; needs --reason"
    )
    promote.add_argument("--reason", metavar="TEXT", help="why it is forced; kept in the history")
    promote.set_defaults(usage_error=promote.error)
    _add_address(promote)


def _promote(options: argparse.Namespace) -> int:
    if options.force and not options.reason:
        options.usage_error("--force needs --reason TEXT: the history keeps why")
    from apt_ray.data.folders import find_categories
    from apt_ray.registry import promote
    from apt_ray.validation.versions import compare_prompt_sets

    normal: Sequence[Location] = ()
    if options.data is not None:
        (found,) = find_categories(options.data, [options.category])
        normal = found.good
    with bar("comparing on held-out images") as progress:
        promotion = promote(
            _registry(options),
            options.category,
            options.version,
            normal=normal,
            force=options.reason if options.force else None,
            compare=partial(compare_prompt_sets, progress=progress),
        )
    print(promotion.report())
    return 0 if promotion.move else _KEPT


def _add_accept(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    accept = add_command(
        commands, "accept", _accept, "let good parts that were rejected join the memory"
    )
    accept.description = (
        "Let images of good parts that the champion rejects join its memory, as a new version that"
        " serves at once; `rollback` takes it back. An image is left out if a confirmed defect"
        " (--defects) that is rejected now would pass with it."
    )
    accept.add_argument("category")
    accept.add_argument("images", nargs="*", type=location, metavar="IMAGE", help="of good parts")
    accept.add_argument("--reason", required=True, metavar="TEXT", help="kept in the history")
    accept.add_argument(
        "--feedback",
        type=location,
        metavar="DIR",
        help="take false alarms and confirmed defects from what a fleet has kept of its feedback:"
        " its folder, or s3://bucket/prefix; each IMAGE is then the id of one, none means all",
    )
    accept.add_argument(
        "--callers",
        type=count,
        default=1,
        metavar="N",
        help="of --feedback, how many callers must agree (default %(default)s)",
    )
    accept.add_argument(
        "--defects",
        nargs="+",
        type=location,
        default=(),
        metavar="IMAGE",
        help="confirmed defects, which must stay rejected: without any, nothing speaks against a"
        " defect that is accepted by mistake",
    )
    accept.add_argument("--force", action="store_true", help="even if a confirmed defect passes")
    accept.set_defaults(usage_error=accept.error)
    _add_address(accept)


def _accept(options: argparse.Namespace) -> int:
    if options.feedback is None and not options.images:
        options.usage_error("name an IMAGE, or a fleet's --feedback")
    if options.feedback is not None and options.defects:
        options.usage_error("--feedback brings its own confirmed defects: leave --defects out")
    from apt_ray.data.feedback import FeedbackStore
    from apt_ray.registry.acceptance import accept_false_alarms, report
    from apt_ray.registry.feedback import accept_feedback

    if options.feedback is None:
        accepted = accept_false_alarms(
            _registry(options),
            options.category,
            options.images,
            why=options.reason,
            defects=options.defects,
            force=options.force,
        )
        names, defects = list(map(str, options.images)), list(map(str, options.defects))
    else:
        used = accept_feedback(
            _registry(options),
            FeedbackStore(options.feedback),
            options.category,
            why=options.reason,
            ids=list(map(str, options.images)),
            callers=options.callers,
            force=options.force,
            serve=True,
        )
        accepted = used.accepted
        names, defects = [each.id for each in used.given], [each.id for each in used.defects]
        for identifier, reason in used.passed_over:
            print(f"passed over: {identifier}: {reason}", file=sys.stderr)
    print(report(accepted, names, defects))
    print(f"{options.category}: version {accepted.source} -> {accepted.version}")
    return 0


def _add_confirm(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    confirm = add_command(
        commands, "confirm", _confirm, "let confirmed defects teach the kinds of defects"
    )
    confirm.description = (
        "Let images of confirmed defects teach the champion to name their kinds, as a new version"
        " that serves at once; `rollback` takes it back. Scores, threshold and verdicts stay what"
        " they were."
    )
    confirm.add_argument("category")
    confirm.add_argument(
        "--defects",
        type=location,
        required=True,
        metavar="DIR",
        help="a folder for each kind of defect, with masks in ground_truth/ or boxes in boxes.csv"
        " where there are any, or s3://bucket/prefix",
    )
    confirm.add_argument("--reason", required=True, metavar="TEXT", help="kept in the history")
    _add_address(confirm)


def _confirm(options: argparse.Namespace) -> int:
    from apt_ray.data.folders import find_defects
    from apt_ray.registry.confirmation import confirm_defects

    defects = find_defects(options.defects)
    confirmed = confirm_defects(_registry(options), options.category, defects, why=options.reason)
    print_confirmation(confirmed.confirmation, defects)
    print(f"{options.category}: version {confirmed.source} -> {confirmed.version}")
    return 0


def _add_rollback(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rollback = add_command(
        commands,
        "rollback",
        _roll_back,
        "let the version serve that served before; again goes one further",
    )
    rollback.add_argument("category")
    rollback.add_argument("--reason", default="", metavar="TEXT", help="kept in the history")
    _add_address(rollback)


def _roll_back(options: argparse.Namespace) -> int:
    from apt_ray.registry import roll_back

    move = roll_back(_registry(options), options.category, why=options.reason)
    print(f"{options.category}: version {move.source} -> {move.target}")
    return 0


def _add_history(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    history = add_command(
        commands, "history", _history, "who let which version serve, when and why"
    )
    history.add_argument("category")
    _add_address(history)


def _history(options: argparse.Namespace) -> int:
    moves = _registry(options).history(options.category).moves
    rows = [
        (
            move.at or "-",
            move.who or "-",
            move.action,
            f"{move.source or '-'} -> {move.target}",
            move.why,
        )
        for move in moves
    ]
    print(align([("when", "who", "what", "version", "why"), *rows]))
    return 0


def _add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diff = add_command(commands, "diff", _diff, "what differs between two versions")
    diff.add_argument("category")
    diff.add_argument("left", nargs="?", default="champion", metavar="ALIAS|N")
    diff.add_argument("right", nargs="?", default="candidate", metavar="ALIAS|N")
    _add_address(diff)


def _diff(options: argparse.Namespace) -> int:
    differences = _registry(options).diff(options.category, options.left, options.right)
    rows = [(name, left or "-", right or "-") for name, left, right in differences]
    print(align([("", options.left, options.right), *rows]))
    return 0


def _add_prune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prune = add_command(commands, "prune", _prune, "delete versions that nobody needs")
    prune.description = (
        "Delete versions from the registry, except those with an alias, the newest of each"
        " category, and what served lately. Without --yes it only says which."
    )
    prune.add_argument("categories", nargs="*", metavar="CATEGORY", help="whose (default: all)")
    prune.add_argument(
        "--keep", type=count, default=5, metavar="N", help="newest to keep (default %(default)s)"
    )
    prune.add_argument(
        "--days",
        type=number(float, most=MAX_DAYS),
        default=90,
        metavar="D",
        help="keep what served in the last D days (default %(default)s)",
    )
    prune.add_argument("--yes", action="store_true", help="delete them")
    _add_address(prune)


def _prune(options: argparse.Namespace) -> int:
    from apt_ray.registry import prune

    pruned = prune(
        _registry(options),
        options.categories,
        keep=options.keep,
        days=options.days,
        dry_run=not options.yes,
    )
    for version in pruned:
        print(f"{version.category}: version {version.version}")
    print(
        f"{len(pruned)} versions deleted; `mlflow gc` on the server frees their space"
        if options.yes
        else f"{len(pruned)} versions would be deleted; with --yes they are",
        file=sys.stderr,
    )
    return 0


def _add_pending(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pending = add_command(
        commands,
        "pending",
        lambda options: register_pending(options.mlflow),
        "register what searches on this machine found while the registry was away",
    )
    _add_address(pending)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = add_command(
        commands, "export", _export, "write all versions, aliases and histories to one file"
    )
    export.add_argument("categories", nargs="*", metavar="CATEGORY", help="whose (default: all)")
    export.add_argument("--out", type=Path, required=True, metavar="FILE.tar", help="where to")
    _add_address(export)


def _export(options: argparse.Namespace) -> int:
    check_writable(options.out)
    from apt_ray.registry import export_registry

    with bar("exporting") as progress:
        backup = export_registry(
            _registry(options), options.out, options.categories, progress=progress
        )
    _print_backup(backup)
    print(f"written to {options.out}", file=sys.stderr)
    return 0


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    restore = add_command(
        commands, "import", _import, "bring a registry to what `export` has written"
    )
    restore.description = (
        "Bring a registry to what `export` has written: the same versions under the same numbers,"
        " with aliases, histories and thresholds. The file is checked first; where the registry has"
        " something else of a category, nothing is changed. An import that was cut off is begun"
        " again by the same command."
    )
    restore.add_argument("file", type=Path, metavar="FILE.tar", help="what `export` wrote")
    restore.add_argument(
        "--dry-run", action="store_true", help="check the file, compare, and change nothing"
    )
    _add_address(restore)


def _import(options: argparse.Namespace) -> int:
    from apt_ray.registry import import_registry

    with bar("importing") as progress:
        backup = import_registry(
            _registry(options), options.file, dry_run=options.dry_run, progress=progress
        )
    _print_backup(backup)
    said = "could be imported" if options.dry_run else "imported"
    print(f"of {backup.source}, written at {backup.written}: {said}", file=sys.stderr)
    return 0


def _print_backup(backup: Backup) -> None:
    for category, versions in backup.versions.items():
        print(f"{category}: {len(versions)} versions, {versions[0]} to {versions[-1]}")


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--mlflow",
        metavar="URI",
        help="address of the MLflow server (default: MLFLOW_TRACKING_URI)",
    )


def _registry(options: argparse.Namespace) -> Registry:
    from apt_ray.registry import open_registry

    return open_registry(options.mlflow)
