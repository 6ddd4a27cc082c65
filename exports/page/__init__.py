"""What an artifact shows on the Hub: model card, report, licence, and the push."""
