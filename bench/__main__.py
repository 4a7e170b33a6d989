# SPDX-License-Identifier: MIT
"""`python -m bench COMMAND`: measure, train, read compiled kernels, print tables; `--help` lists the commands."""

import importlib
import importlib.util
import sys

MODULES = {  # of each command, a function of the same name; imported on first use
    "quick": ".quick",
    "expand": ".expand",
    "attention": ".attention.command",
    "decode": ".decode.command",
    "train": ".train.command",
    "codegen": ".codegen.command",
    "sweep": ".sweep.command",
    "scale": ".scale.command",
    "host": ".host",
    "gpu": ".gpu.command",
    "table": ".report",
    "pages": ".pages",
}
NEEDED = ("torch", "einops", "click", "tabulate", "tqdm")

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    print(f"python -m bench needs {', '.join(missing)}, which {sys.executable} does not have", file=sys.stderr)
    sys.exit(2)

import click  # noqa: E402


class _Commands(click.Group):
    """The commands of `MODULES`. Using one imports no other."""

    def list_commands(self, context):
        return list(MODULES)

    def get_command(self, context, name):
        return getattr(importlib.import_module(MODULES[name], __package__), name) if name in MODULES else None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli():
    """Benchmarks of dpb_triton. Compare times within one run only: they depend on the machine and the moment."""


if __name__ == "__main__":
    cli(prog_name="python -m bench")
