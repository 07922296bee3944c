"""Which group or instance a request goes to, as it arrives."""
