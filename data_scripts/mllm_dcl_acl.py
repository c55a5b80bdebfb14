"""Fetches MLLM-CL: its five domains (about 18 GiB) or, with `--abilities`, its four abilities (about 107 GiB).

Run without arguments to see sizes and licences first.
"""

from __future__ import annotations

import sys

from _fetch import Part, Plan, run

from mllm_cl.data.builders import mllm_acl, mllm_dcl

_HUB = "MLLM-CL/MLLM-CL"


def plan(names: tuple[str, ...], family) -> Plan:
    """One part per folder of the Hub data set."""
    parts = tuple(
        Part(name, f"rows and images of {name}", hub=_HUB, patterns=(f"*{name}/*", f"*{name}.*"), unpack="")
        for name in names
    )
    return Plan(family, parts, by_hand=("ModelScope has the same files: data set zhaohongbo/MLLM-CL",))


DOMAINS = plan(("RS", "Med", "AD", "Sci", "Fin"), mllm_dcl.FAMILY)
_ABILITIES = tuple(name for ability in ("OCR", "Math", "VP", "APP") for name in (ability, f"{ability}_test"))
ABILITIES = plan(_ABILITIES, mllm_acl.FAMILY)

if __name__ == "__main__":
    chosen = ABILITIES if "--abilities" in sys.argv else DOMAINS
    sys.exit(run(chosen, [argument for argument in sys.argv[1:] if argument != "--abilities"]))
