"""What others see of a pruned model: report, card, pictures, and the Hub."""
