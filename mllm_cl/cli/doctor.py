"""`mllm-cl doctor`: versions, devices, optional parts, and what will and will not work here."""

from __future__ import annotations


def doctor() -> None:
    """Check this machine: versions, devices, optional parts, and what will and will not work."""
    from mllm_cl.cli.display import make_progress, say, show_table
    from mllm_cl.cli.environment import check_environment
    from mllm_cl.errors import MllmClError

    with make_progress() as progress, progress.waiting("looking at this machine"):
        checks = check_environment()
    show_table([["what", "state", "found", "meaning"], *([c.name, c.state, c.found, c.meaning] for c in checks)])
    broken = [check for check in checks if check.state == "broken"]
    if broken:
        raise MllmClError(
            "this installation does not work: " + "; ".join(f"{check.name}: {check.found}" for check in broken),
            fix="see `meaning` above; `make venv` builds an environment that is known to work.",
        )
    warned = sum(check.state == "warning" for check in checks)
    say("everything required works" + (f"; {warned} warning(s), see above." if warned else "."))
