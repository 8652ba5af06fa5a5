"""utils.logger as LlamaGen has it. Our trainings log by utils/training/logger.py."""
import logging
import sys
from pathlib import Path

from utils import dist

__all__ = ["create_logger"]


def create_logger(logging_dir: str | Path | None) -> logging.Logger:
    """A logger that writes to the screen and to <logging_dir>/log.txt on rank 0, and nowhere on other ranks."""
    logger = logging.getLogger("llamagen")
    for handler in logger.handlers[:]:  # of an earlier call
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if dist.env_rank() > 0 or logging_dir is None:
        logger.addHandler(logging.NullHandler())
        return logger
    Path(logging_dir).mkdir(parents=True, exist_ok=True)
    for handler in (logging.StreamHandler(sys.stderr), logging.FileHandler(Path(logging_dir) / "log.txt")):
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger
