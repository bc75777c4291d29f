//! cogvlm-pipeline
