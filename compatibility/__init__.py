"""Names of LlamaGen's modules that code of its users imports and that have another name or shape here.

`from autoregressive.models.gpt import GPT_B` works although gpt.py has no GPT_B: a module of ours that bears LlamaGen's
name ends with `__getattr__ = missing_names(__name__)` (utils/compatible.py; PEP 562), which looks here, in the file of
the same last name, when somebody asks for a name that the module lacks. So our rooms import nothing of this one, it may
import all of them, and every name has one definition: here are only other names, and functions of ours with LlamaGen's
signatures. What is promised is each file's `__all__`; tests/house/test_compatibility.py uses all of it.
"""
