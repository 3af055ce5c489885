"""Style-guided identity and clothing texts: styles, prompts, describers, validation, a resumable run."""
