# SPDX-License-Identifier: MIT
"""`python -m bench expand|attention|train|codegen|sweep|gpu|host|table`: measure, train, read compiled code, show."""

import click

from .attention import attention
from .codegen import codegen
from .expand import expand
from .gpu import gpu
from .host import host
from .report import table
from .sweep import sweep
from .train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli():
    """Benchmarks of dpb_triton. Ratios hold within one run; absolute times are this machine's at this moment."""


for command in (expand, attention, train, codegen, sweep, gpu, host, table):
    cli.add_command(command)

if __name__ == "__main__":
    cli(prog_name="python -m bench")
