"""The method on any nn.Module: singular triplets, policies, calibration, the adapter on stock PEFT."""
