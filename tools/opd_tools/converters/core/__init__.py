"""What every importer hands over, and how it becomes a rollout."""
