"""mm-convert: weights between Hugging Face folders, the MindSpeed-MM layout, and training saves."""
