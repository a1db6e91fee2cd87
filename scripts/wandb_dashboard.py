"""Create the W&B workspace of a project. It shows accuracy, alignment, stability, learning rates and throughput.

    python scripts/wandb_dashboard.py --entity TEAM [--project dfl-experiments] [--layers 5] [--out dashboard.json]

The script needs `pip install "dfl-experiments[dashboard]"` and a login (`wandb login`). If the login, the network or
the entity is missing, the script writes the specification of the workspace to a file, and prints the reason.
"""

import argparse
import os
from pathlib import Path

from wandb.errors import Error as WandbError


def main() -> None:
    """Save the workspace to W&B, or write its specification to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", help="user or team that owns the project")
    parser.add_argument("--project", default="dfl-experiments", help="default: %(default)s")
    parser.add_argument(
        "--layers",
        type=int,
        default=5,
        help="number of hidden layers to show (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("dashboard.json"),
        help="output file (default: %(default)s)",
    )
    options = parser.parse_args()
    try:
        from wandb_panels import dashboard  # imported here, so that --help works without the extra
    except ModuleNotFoundError as error:
        parser.exit(
            1, f'error: {error.name} is missing: pip install "dfl-experiments[dashboard]"\n'
        )
    workspace = dashboard(options.entity or "", options.project, options.layers)
    try:
        if not options.entity:
            raise ValueError("no --entity")
        os.environ.setdefault("WANDB_SILENT", "true")
        workspace.save()
        print(f"workspace: {workspace.url}")
    except (WandbError, ValueError, OSError) as error:
        why = " ".join(str(error).split())
        options.out.write_text(
            workspace._to_model().model_dump_json(indent=2, by_alias=True) + "\n"
        )
        print(f"not saved to W&B ({why}); its specification is in {options.out}")


if __name__ == "__main__":
    main()
