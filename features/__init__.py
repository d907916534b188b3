"""Images and prompts to cached tensors; never imports `pipeline`. A file here is a stage and a command."""
