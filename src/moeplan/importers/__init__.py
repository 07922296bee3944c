"""From other tools' files to traces, one module per source."""
