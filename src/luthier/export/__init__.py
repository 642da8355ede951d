"""What was trained in the forms that others open: merged folders, GGUF files, adapters of PEFT, llama.cpp and mlx-lm."""
