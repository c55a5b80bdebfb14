"""`python -m mllm_cl` is `mllm-cl`."""

from mllm_cl.cli.app import app

if __name__ == "__main__":
    app(prog_name="mllm-cl")
