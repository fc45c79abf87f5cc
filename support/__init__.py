"""What every command needs: settings, a run's folder, the trained model, logs, the machine."""
