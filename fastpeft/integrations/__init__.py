"""The only files that know internals of transformers, peft and bitsandbytes.

Importing this package makes attn_implementation="fastpeft" known to transformers, where that is installed: see attention.py.
"""

import contextlib

with contextlib.suppress(ImportError):
    from fastpeft.integrations import attention as attention
