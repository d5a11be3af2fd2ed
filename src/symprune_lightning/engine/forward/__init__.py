"""The suspended calibration forward and the statistics that it collects."""
