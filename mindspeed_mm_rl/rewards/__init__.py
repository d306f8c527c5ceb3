"""Rule rewards: verifiers by name, graded in processes that can be killed. Nothing here imports torch: workers must start fast."""
