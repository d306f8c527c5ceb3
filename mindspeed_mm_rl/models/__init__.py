"""The models on megatron-core, and the tables that tie them to Hugging Face."""
