"""LlamaGen's module of this name, for code that imports from it: what it has is in compatibility/logger.py."""
from utils.compatible import missing_names

__getattr__ = missing_names(__name__)
