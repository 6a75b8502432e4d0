"""Where messages come from and predictions go to: Kafka, files and memory, with durable state, metrics and the CLI."""
