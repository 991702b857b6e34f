"""Peers that judge us: a real Apache Kafka, and the tools that come with it."""
