//! From measured times to rates and shares, and to text and JSON.

use cogvlm_core::memory::format_bytes;
use cogvlm_pipeline::Way;
use serde_json::{Map, Value, json};

use crate::cluster::{way_text, ways_json};

use super::ceilings::Ceilings;
use super::memory::DeviceMemory;
use super::work::Work;

/// What a run of `bench` found. Times are medians in seconds.
pub(super) struct Report {
    pub(super) model: String,
    pub(super) dtype: String,
    pub(super) backend: &'static str,
    pub(super) num_threads: usize,
    /// Tokens of one prompt, the image's included.
    pub(super) num_prompt: usize,
    pub(super) has_image: bool,
    /// Sequences that memory is planned for.
    pub(super) batch: usize,
    pub(super) repeats: usize,
    pub(super) load: Load,
    /// Of one sequence: from the request to its first token.
    pub(super) first_token_s: f64,
    pub(super) vision_s: f64,
    pub(super) prefill_s: f64,
    pub(super) work: Work,
    /// For each number of sequences, that of one first.
    pub(super) decode: Vec<Decode>,
    /// By the rates that the plan was made with.
    pub(super) predicted: Predicted,
    /// By the rates that this run measured itself.
    pub(super) predicted_here: Option<Predicted>,
    pub(super) ceilings: Option<Ceilings>,
    pub(super) memory: Vec<DeviceMemory>,
    /// What carried rows between processes.
    pub(super) ways: Vec<Way>,
}

/// Loading.
pub(super) struct Load {
    pub(super) seconds: f64,
    /// All weights, wherever they rest.
    pub(super) weight_bytes: u64,
    /// Those that were copied to numbered devices.
    pub(super) copied_bytes: u64,
    /// Numbered devices that hold weights. Each loads by a thread and a link of its own.
    pub(super) num_links: usize,
    /// Time to get ready for many prompts, after the first one.
    pub(super) ready_s: f64,
    /// From the start of the command to the first token of the first request, before which nothing has run.
    pub(super) to_first_token_s: f64,
}

impl Load {
    /// `None` where weights are used where they are mapped.
    fn bytes_per_s(&self) -> Option<f64> {
        (self.copied_bytes > 0).then(|| self.copied_bytes as f64 / self.seconds)
    }

    fn share_of_links(&self, ceilings: Option<&Ceilings>) -> Option<f64> {
        let link = ceilings?.link_bytes_per_s?;
        Some(self.bytes_per_s()? / (link * self.num_links.max(1) as f64))
    }

    fn json(&self, ceilings: Option<&Ceilings>) -> Value {
        json!({
            "ms": self.seconds * 1e3, "weight_bytes": self.weight_bytes, "copied_bytes": self.copied_bytes,
            "bytes_per_s": self.bytes_per_s(), "share_of_ceiling": self.share_of_links(ceilings),
            "to_first_token_ms": self.to_first_token_s * 1e3, "ready_ms": self.ready_s * 1e3,
        })
    }

    fn text(&self, ceilings: Option<&Ceilings>) -> String {
        let copied = self.bytes_per_s().map_or_else(String::new, |rate| {
            let share = self.share_of_links(ceilings).map(|share| format!(" = {:.0} % of the link", 100.0 * share));
            format!(", {} copied, {}{}", format_bytes(self.copied_bytes), gigabytes(rate), share.unwrap_or_default())
        });
        let (ms, first) = (self.seconds * 1e3, self.to_first_token_s * 1e3);
        let weights = format_bytes(self.weight_bytes);
        let ready = if self.ready_s < 0.01 {
            String::new()
        } else {
            let ms = self.ready_s * 1e3;
            format!("\n  ready     {ms:9.1} ms   after it, to register what many prompts are streamed from")
        };
        format!(
            "  load      {ms:9.1} ms   {weights} of weights{copied}\n  cold start{first:9.1} ms   from the command to \
             its first token, of one sequence{ready}"
        )
    }
}

/// Decoding so many sequences at once.
pub(super) struct Decode {
    pub(super) sequences: usize,
    pub(super) step_s: f64,
    /// From the first request to the first token of the last.
    pub(super) prefill_s: f64,
    /// Where sequences were running while the prompts of others were computed.
    pub(super) gaps: Option<Gaps>,
    /// Counted for one step: the weights that a token needs, once, and the KV cache of every sequence.
    pub(super) bytes: f64,
}

/// Between two tokens of a running sequence, while the prompts of others are computed.
pub(super) struct Gaps {
    /// Of all.
    pub(super) median_s: f64,
    /// Of the longest of each run.
    pub(super) longest_s: f64,
}

impl Gaps {
    fn json(&self) -> Value {
        json!({"median_ms": self.median_s * 1e3, "longest_ms": self.longest_s * 1e3})
    }

    fn text(&self, sequences: usize) -> String {
        let (median, longest) = (self.median_s * 1e3, self.longest_s * 1e3);
        format!(
            "  gaps   {sequences:<3}{median:9.2} ms   {longest:.2} ms at most, from token to token beside the prompts of \
             others"
        )
    }
}

impl Decode {
    fn prompts_per_s(&self) -> f64 {
        self.sequences as f64 / self.prefill_s
    }

    /// How fast prompts are computed that wait in a row.
    fn prompts_text(&self) -> Option<String> {
        let (sequences, milliseconds, rate) = (self.sequences, self.prefill_s * 1e3, self.prompts_per_s());
        (sequences > 1).then(|| {
            format!("  prompts{sequences:>3} {milliseconds:9.1} ms {rate:10.1} prompts/s   for the first token of all")
        })
    }

    fn tokens_per_s(&self) -> f64 {
        self.sequences as f64 / self.step_s
    }

    fn bytes_per_s(&self) -> f64 {
        self.bytes / self.step_s
    }

    fn share(&self, ceilings: Option<&Ceilings>) -> Option<f64> {
        ceilings.map(|ceilings| self.bytes_per_s() / ceilings.bytes_per_s)
    }

    fn json(&self, first: &Self, ceilings: Option<&Ceilings>) -> Value {
        json!({
            "sequences": self.sequences, "ms_per_step": self.step_s * 1e3, "tokens_per_s": self.tokens_per_s(),
            "bytes_per_s": self.bytes_per_s(), "share_of_ceiling": self.share(ceilings),
            "speedup": self.tokens_per_s() / first.tokens_per_s(), "prefill_ms": self.prefill_s * 1e3,
            "prompts_per_s": self.prompts_per_s(),
            "gaps_beside_prompts": self.gaps.as_ref().map(Gaps::json),
        })
    }

    fn text(&self, first: &Self, ceilings: Option<&Ceilings>) -> String {
        format!(
            "  decode {:<3}{:9.2} ms {:10.1} tokens/s x {:5.2} {:>15}{}",
            self.sequences,
            self.step_s * 1e3,
            self.tokens_per_s(),
            self.tokens_per_s() / first.tokens_per_s(),
            gigabytes(self.bytes_per_s()),
            percent(self.share(ceilings))
        )
    }
}

/// What given rates predict of the work that was measured.
pub(super) struct Predicted {
    /// Where the rates come from.
    pub(super) rates: String,
    /// The prefill of one prompt.
    pub(super) prefill_s: f64,
    /// A token of each sequence, for each number of them.
    pub(super) decode_s: Vec<f64>,
    /// Ranks that decode: where there are several, the sequences take turns on them.
    pub(super) num_text_ranks: usize,
}

impl Predicted {
    fn json(&self, report: &Report) -> Value {
        let prefill = deviation_percent(report.prefill_s, self.prefill_s);
        let image = |value: Option<f64>| value.filter(|_| report.has_image);
        let steps = report.decode.iter().zip(&self.decode_s);
        let steps: Vec<Value> = steps
            .map(|(decode, &step_s)| {
                json!({
                    "sequences": decode.sequences, "ms_per_step": step_s * 1e3,
                    "tokens_per_s": decode.sequences as f64 / step_s,
                    "deviation_percent": deviation_percent(decode.step_s, step_s),
                })
            })
            .collect();
        json!({
            "rates": self.rates,
            "decode_ms": self.decode_s[0] * 1e3, "decode_deviation_percent": steps[0]["deviation_percent"],
            "image_ms": image(Some(self.prefill_s * 1e3)), "image_deviation_percent": image(prefill),
            "prefill_ms": self.prefill_s * 1e3, "prefill_deviation_percent": prefill,
            "decode": steps,
        })
    }

    /// `   predicted 8.00 ms: +25 %`, behind the measured time of a prefill.
    fn beside_prefill(&self, report: &Report) -> String {
        beside(self.prefill_s, deviation_percent(report.prefill_s, self.prefill_s), "")
    }

    /// The same behind a decode step, with the tokens per second of sequences that take turns.
    fn beside_decode(&self, decode: &Decode, step_s: f64) -> String {
        let rate = decode.sequences as f64 / step_s;
        let rate = if self.num_text_ranks > 1 { format!(", {rate:.0} tokens/s") } else { String::new() };
        beside(step_s, deviation_percent(decode.step_s, step_s), &rate)
    }

    /// All of it in a few lines.
    fn text(&self, report: &Report) -> String {
        let part = |what: String, seconds: f64, measured: f64| {
            let off = deviation_percent(measured, seconds).map(|off| format!(": {off:+.0} %")).unwrap_or_default();
            format!("{what} {:.2} ms{off}", seconds * 1e3)
        };
        let steps = report.decode.iter().zip(&self.decode_s);
        let steps = steps.map(|(decode, &step_s)| part(format!("decode {}", decode.sequences), step_s, decode.step_s));
        let prefill = part("prefill".to_owned(), self.prefill_s, report.prefill_s);
        let parts: Vec<String> = std::iter::once(prefill).chain(steps).collect();
        let lines: Vec<String> = parts.chunks(4).map(|parts| format!("            {}", parts.join(", "))).collect();
        format!("  predicted by rates {}:\n{}", self.rates, lines.join("\n"))
    }
}

/// A predicted time behind the measured one.
fn beside(seconds: f64, deviation: Option<f64>, more: &str) -> String {
    deviation.map_or_else(String::new, |off| format!("   predicted {:.2} ms{more}: {off:+.0} %", seconds * 1e3))
}

impl Report {
    fn share_of_flops(&self, rate: f64) -> Option<f64> {
        self.ceilings.as_ref().map(|ceilings| rate / ceilings.flops_per_s)
    }

    fn vision_rate(&self) -> f64 {
        self.work.vision_flops / self.vision_s.max(1e-12)
    }

    fn prefill_rate(&self) -> f64 {
        self.work.prefill_flops / self.prefill_s
    }

    pub(super) fn json(&self) -> Value {
        let ceilings = self.ceilings.as_ref();
        let (vision, prefill) = (self.vision_rate(), self.prefill_rate());
        let memory: Map<String, Value> =
            self.memory.iter().map(|memory| (memory.device.to_string(), memory.json())).collect();
        let mut report = json!({
            "schema": "cogvlm-shard.bench/2",
            "model": self.model,
            "dtype": self.dtype,
            "backend": self.backend,
            "threads": self.num_threads,
            "prompt_tokens": self.num_prompt,
            "batch": self.batch,
            "repeats": self.repeats,
            "load": self.load.json(ceilings),
            "ttft": {"ms": self.first_token_s * 1e3},
            "vision": {
                "ms": self.vision_s * 1e3, "flops_per_s": vision, "share_of_ceiling": self.share_of_flops(vision),
            },
            "prefill": {
                "ms": self.prefill_s * 1e3, "tokens_per_s": self.num_prompt as f64 / self.prefill_s,
                "flops_per_s": prefill, "share_of_ceiling": self.share_of_flops(prefill),
            },
            "decode": self.decode.iter().map(|decode| decode.json(&self.decode[0], ceilings)).collect::<Vec<_>>(),
            "predicted": self.predicted.json(self),
            "predicted_by_measured_rates": self.predicted_here.as_ref().map(|predicted| predicted.json(self)),
            "ceiling": ceilings.map(Ceilings::json),
            "memory": memory,
        });
        if !self.ways.is_empty() {
            report["transport"] = ways_json(&self.ways);
        }
        report
    }

    pub(super) fn text(&self) -> String {
        let ceilings = self.ceilings.as_ref();
        let arithmetic = |rate: f64| format!("{:>15}{}", flops_rate(rate), percent(self.share_of_flops(rate)));
        let mut lines = vec![
            format!(
                "{} in {} on {}, {} prompt tokens, medians of {}",
                self.model, self.dtype, self.backend, self.num_prompt, self.repeats
            ),
            self.load.text(ceilings),
            format!("  ttft      {:9.1} ms   from the request to the first token", self.first_token_s * 1e3),
        ];
        if self.has_image {
            let vision = arithmetic(self.vision_rate());
            lines.push(format!("  vision    {:9.1} ms   of the prefill            {vision}", self.vision_s * 1e3));
        }
        lines.push(format!(
            "  prefill   {:9.1} ms {:10.1} tokens/s         {}{}",
            self.prefill_s * 1e3,
            self.num_prompt as f64 / self.prefill_s,
            arithmetic(self.prefill_rate()),
            self.predicted.beside_prefill(self)
        ));
        lines.extend(self.decode.iter().zip(&self.predicted.decode_s).map(|(decode, &step_s)| {
            decode.text(&self.decode[0], ceilings) + &self.predicted.beside_decode(decode, step_s)
        }));
        lines.extend(self.decode.iter().filter_map(Decode::prompts_text));
        lines.extend(self.decode.iter().filter_map(|decode| Some(decode.gaps.as_ref()?.text(decode.sequences))));
        lines.extend(ceilings.map(Ceilings::text));
        if !self.predicted.rates.is_empty() {
            lines.push(format!("  predicted above by rates {}", self.predicted.rates));
        }
        lines.extend(self.predicted_here.as_ref().map(|predicted| predicted.text(self)));
        lines.extend(self.memory.iter().map(DeviceMemory::text));
        lines.extend(self.ways.iter().map(|way| format!("  {}", way_text(way))));
        lines.join("\n")
    }
}

/// How far a measured time lies above the predicted one.
fn deviation_percent(measured: f64, predicted: f64) -> Option<f64> {
    (predicted > 0.0 && predicted.is_finite()).then(|| 100.0 * (measured / predicted - 1.0))
}

pub(super) fn gigabytes(rate: f64) -> String {
    format!("{:.1} GB/s", rate / 1e9)
}

pub(super) fn flops_rate(rate: f64) -> String {
    if rate < 1e12 { format!("{:.1} GFLOP/s", rate / 1e9) } else { format!("{:.1} TFLOP/s", rate / 1e12) }
}

/// A share behind the rate that it is of, where it is known.
pub(super) fn percent(share: Option<f64>) -> String {
    share.map_or_else(String::new, |share| format!(" = {:3.0} %", 100.0 * share))
}

pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::super::ceilings::example;
    use super::*;

    fn near(found: &Value, expected: f64) {
        let number = found.as_f64().unwrap_or_else(|| panic!("{found} is no number"));
        assert!((number / expected - 1.0).abs() < 1e-9, "{number} for {expected}");
    }

    fn predicted(rates: &str, num_text_ranks: usize) -> Predicted {
        Predicted { rates: rates.to_owned(), prefill_s: 0.1, decode_s: vec![0.008, 0.02], num_text_ranks }
    }

    fn report() -> Report {
        let load = Load {
            seconds: 2.0,
            weight_bytes: 60_000_000_000,
            copied_bytes: 50_000_000_000,
            num_links: 2,
            ready_s: 0.5,
            to_first_token_s: 2.5,
        };
        Report {
            model: "tiny@1".to_owned(),
            dtype: "bf16".to_owned(),
            backend: "cuda",
            num_threads: 2,
            num_prompt: 100,
            has_image: true,
            batch: 4,
            repeats: 3,
            load,
            first_token_s: 0.06,
            vision_s: 0.02,
            prefill_s: 0.05,
            work: Work { hot_bytes: 0, vision_flops: 6e12, prefill_flops: 15e12 },
            decode: [(1, 0.010, 15e9, None), (4, 0.016, 18e9, Some(Gaps { median_s: 0.012, longest_s: 0.034 }))]
                .map(|(sequences, step_s, bytes, gaps)| Decode { sequences, step_s, prefill_s: 0.05, gaps, bytes })
                .into(),
            predicted: predicted("assumed", 1),
            predicted_here: Some(Predicted {
                prefill_s: 0.04,
                decode_s: vec![0.0125, 0.02],
                ..predicted("measured", 1)
            }),
            ceilings: Some(example()),
            memory: Vec::new(),
            ways: Vec::new(),
        }
    }

    #[test]
    fn rates_and_shares_are_those_of_the_measured_times() {
        let json = report().json();
        for (place, expected) in [
            ("/load/bytes_per_s", 25e9),
            // Two links of 50 GB/s each.
            ("/load/share_of_ceiling", 0.25),
            ("/load/to_first_token_ms", 2500.0),
            ("/vision/share_of_ceiling", 0.5),
            ("/prefill/tokens_per_s", 2000.0),
            ("/prefill/share_of_ceiling", 0.5),
            ("/decode/0/tokens_per_s", 100.0),
            ("/decode/0/bytes_per_s", 1.5e12),
            ("/decode/0/share_of_ceiling", 0.5),
            ("/decode/0/speedup", 1.0),
            ("/decode/1/sequences", 4.0),
            ("/decode/1/ms_per_step", 16.0),
            ("/decode/1/tokens_per_s", 250.0),
            ("/decode/1/speedup", 2.5),
            ("/decode/1/share_of_ceiling", 0.375),
            ("/decode/1/gaps_beside_prompts/median_ms", 12.0),
            ("/decode/1/gaps_beside_prompts/longest_ms", 34.0),
            ("/predicted/decode_deviation_percent", 25.0),
            ("/predicted/image_deviation_percent", -50.0),
            ("/predicted/prefill_deviation_percent", -50.0),
            ("/predicted/decode/1/ms_per_step", 20.0),
            ("/predicted/decode/1/tokens_per_s", 200.0),
            ("/predicted/decode/1/deviation_percent", -20.0),
            ("/predicted_by_measured_rates/decode_deviation_percent", -20.0),
            ("/predicted_by_measured_rates/image_deviation_percent", 25.0),
        ] {
            near(json.pointer(place).unwrap_or_else(|| panic!("{place}: {json}")), expected);
        }
    }

    #[test]
    fn text_fits_a_screen_and_has_a_line_for_each_number_of_sequences() {
        let text = report().text();
        let line = |start: &str| text.lines().find(|line| line.trim_start().starts_with(start)).expect(start);
        assert!(line("load").ends_with("46.57 GiB copied, 25.0 GB/s = 25 % of the link"), "{text}");
        assert!(line("prefill").contains("300.0 TFLOP/s =  50 %   predicted 100.00 ms: -50 %"), "{text}");
        assert!(line("decode 1").contains("1500.0 GB/s =  50 %   predicted 8.00 ms: +25 %"), "{text}");
        assert!(line("decode 4").contains("250.0 tokens/s x  2.50"), "{text}");
        assert!(line("decode 4").ends_with("predicted 20.00 ms: -20 %"), "{text}");
        assert!(line("gaps   4").contains("12.00 ms   34.00 ms at most"), "{text}");
        assert_eq!(text.matches("gaps").count(), 1, "one sequence waits for nobody: {text}");
        assert!(text.contains("\n  predicted above by rates assumed\n  predicted by rates measured:\n"), "{text}");
        let all = "            prefill 40.00 ms: +25 %, decode 1 12.50 ms: -20 %, decode 4 20.00 ms: -20 %";
        assert!(text.ends_with(all), "{text}");
        assert!(text.lines().all(|line| line.len() <= 120), "{text}");
    }

    /// On several ranks sequences take turns: what they make together is predicted too.
    #[test]
    fn throughput_of_several_ranks_is_predicted() {
        let text = Report { predicted: predicted("assumed", 2), ..report() }.text();
        assert!(text.contains("predicted 20.00 ms, 200 tokens/s: -20 %"), "{text}");
    }

    #[test]
    fn shares_are_left_out_where_nothing_measured_them() {
        let report = Report { ceilings: None, predicted_here: None, has_image: false, ..report() };
        let json = report.json();
        for place in ["/ceiling", "/load/share_of_ceiling", "/decode/0/share_of_ceiling", "/prefill/share_of_ceiling"] {
            assert_eq!(json.pointer(place), Some(&Value::Null), "{place}");
        }
        assert_eq!(json["predicted"]["image_deviation_percent"], Value::Null, "no image");
        assert_eq!(json["predicted_by_measured_rates"], Value::Null);
        let text = report.text();
        assert!(!text.contains("measured") && !text.contains("vision"), "{text}");
        assert_eq!(text.matches(" %").count(), 3, "deviations alone: {text}");
    }

    #[test]
    fn deviations_need_a_prediction() {
        assert_eq!(deviation_percent(3.0, 2.0), Some(50.0));
        assert_eq!(deviation_percent(3.0, 0.0), None);
        assert_eq!(deviation_percent(3.0, f64::INFINITY), None);
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
    }
}
