// The losses whose formula the core has itself, by name.
#pragma once

#include "math/advantage_flow.h"
#include "math/diffusion_nft.h"
#include "math/flow_awr.h"
#include "math/flow_dppo.h"
#include "math/flow_grpo.h"
#include "math/reward_weighted.h"

constexpr const char* kAdvflowLossNames[ADVFLOW_LOSSES] = {"advantage_flow",  "diffusion_nft", "flow_awr",
                                                           "reward_weighted", "flow_grpo",     "flow_dppo"};

// Calls f(Loss{}) for the loss.
template <typename F>
auto advflow_with_loss(AdvflowLoss loss, F f) {
  switch (loss) {
    case ADVFLOW_DIFFUSION_NFT:
      return f(AdvflowDiffusionNft{});
    case ADVFLOW_FLOW_AWR:
      return f(AdvflowFlowAwr{});
    case ADVFLOW_REWARD_WEIGHTED:
      return f(AdvflowRewardWeighted{});
    case ADVFLOW_FLOW_GRPO:
      return f(AdvflowFlowGrpo{});
    case ADVFLOW_FLOW_DPPO:
      return f(AdvflowFlowDppo{});
    default:
      return f(AdvflowAdvantageFlow{});
  }
}
