"""The opponent's answers by vLLM engines in processes of their own."""
