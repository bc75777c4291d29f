//! cogvlm-model
