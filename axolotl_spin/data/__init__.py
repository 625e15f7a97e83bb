"""From rows to prompts to pairs, all of it token ids."""
