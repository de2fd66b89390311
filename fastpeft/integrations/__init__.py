"""The only files that know internals of transformers, peft and bitsandbytes."""
