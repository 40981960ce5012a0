"""HTTP and OpenAI's shapes. No tensors."""
