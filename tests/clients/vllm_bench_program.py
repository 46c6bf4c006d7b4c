"""Run in vLLM's environment: `vllm bench serve` with argv's options.

The CPU build is a distribution of another name, which the `vllm` command does not find; this calls what it would.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
